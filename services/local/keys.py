"""``baton key``: a new API key, and what a tenants file says of it."""

from __future__ import annotations

import secrets
import sys

from baton.services.core.errors import ConfigurationError
from baton.services.gateway.tenant_files import hashed, is_tenant_name

_KEY_PREFIX = "bt-"


def print_new_key(tenant: str) -> int:
    """The key goes to standard error and the entry to standard output, so that the entry alone can be appended to a file."""
    if not is_tenant_name(tenant):
        raise ConfigurationError(
            "TENANT: must be 1 to 64 letters, digits, '.', '_' and '-', and begin with one of the first"
        )
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    sys.stderr.write(f"The key of {tenant}, which nobody can show again:\n{key}\n")
    sys.stderr.flush()
    sys.stdout.write(f'  - name: {tenant}\n    keys: ["{hashed(key)}"]\n')
    return 0
