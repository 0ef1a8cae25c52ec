"""API keys. A key gives the tenant, and the tenant is hashed into every block name: caches never cross tenants."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.tenants import ANONYMOUS, Tenant
from baton.services.gateway.tenant_files import key_digest, ring_of_keys

# What works without a key; every other path of the REST API needs one where keys are set.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/metrics", "/version"})


class Authenticator:
    """Knows the digests of the keys, not the keys. Without keys everyone is the anonymous tenant."""

    def __init__(self, api_keys: Iterable[str] = (), ring: Mapping[bytes, Tenant] | None = None) -> None:
        """``ring``: digest of a key -> its tenant. ``api_keys`` are added, each a tenant of its own."""
        self._ring = {**(ring or {}), **ring_of_keys(api_keys)}

    @property
    def needs_key(self) -> bool:
        return bool(self._ring)

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        return tuple(self._ring.values())

    def replace(self, ring: Mapping[bytes, Tenant]) -> None:
        """Other keys from now on. An empty ring would let everybody in: refused where there was one."""
        assert ring or not self._ring
        self._ring = dict(ring)

    def tenant(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        """The tenant of an ``Authorization: Bearer`` value, or of an ``x-api-key`` one. Raises UNAUTHENTICATED.

        Compares with every key in constant time, so that neither content nor position can be measured.
        """
        if not self._ring:
            return ANONYMOUS
        scheme, _, key = ("bearer", "", api_key) if authorization is None and api_key else _split(authorization)
        presented = key_digest(key.strip())
        found: Tenant | None = None
        for digest, tenant in self._ring.items():
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            message = "A valid API key is needed: send it as 'Authorization: Bearer KEY'."
            raise BatonError(ErrorCode.UNAUTHENTICATED, message)
        return found


def _split(authorization: str | None) -> tuple[str, str, str]:
    return (authorization or "").partition(" ")


def tenant_salt(tenant: Tenant, cache_salt: str | None) -> str:
    """What separates caches: tenant and the request's own salt. The tenant is hex, so the first "/" ends it."""
    return f"{tenant.tenant_id}/{cache_salt or ''}"
