"""API keys. A key gives the tenant, and the tenant is hashed into every block name: caches never cross keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from baton.services.core.errors import BatonError, ConfigurationError, ErrorCode

# What works without a key; every other path of the REST API needs one where keys are set.
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})

# All clients of a gateway without keys.
ANONYMOUS_TENANT = ""


class Authenticator:
    """Knows the digests of the keys, not the keys. Without keys everyone is the anonymous tenant."""

    def __init__(self, api_keys: Iterable[str] = ()) -> None:
        keys = tuple(api_keys)
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigurationError("an API key must be visible ASCII characters without spaces, at least one")
        self._tenants = {_digest(key): _tenant(key) for key in keys}

    @property
    def needs_key(self) -> bool:
        return bool(self._tenants)

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an ``Authorization: Bearer`` value. Raises UNAUTHENTICATED.

        Compares with every key in constant time, so that neither content nor position can be measured.
        """
        if not self._tenants:
            return ANONYMOUS_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        presented = _digest(key.strip())
        found: str | None = None
        for digest, tenant in self._tenants.items():
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            message = "A valid API key is needed: send it as 'Authorization: Bearer KEY'."
            raise BatonError(ErrorCode.UNAUTHENTICATED, message)
        return found


def tenant_salt(tenant: str, cache_salt: str | None) -> str:
    """What separates caches: tenant and the request's own salt. The tenant is hex, so the first "/" ends it."""
    return f"{tenant}/{cache_salt or ''}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _tenant(key: str) -> str:
    # Not the digest that keys are checked with: this one leaves the process, inside requests to workers.
    return hashlib.blake2b(_digest(key), digest_size=16, person=b"baton-tenant").hexdigest()
