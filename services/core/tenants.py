"""Who a request belongs to, and how much of everything its owner may take.

A request is let in while its tenant has something left, and what it takes is counted as it is known: the prompt once it is
tokens, the answer token by token. So a tenant may overdraw by what was under way, and then waits until that is made up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.rate_limit import Bucket, Window

_MINUTE_S = 60.0
_DAY_S = 86400.0
# Until one of the tenant's own requests ends, roughly: nobody can know.
_SLOT_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """None: no limit. Tokens are those of prompts and answers together."""

    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """The owner of some API keys. ``tenant_id`` is hex, and part of every block name; ``weight``: its share of busy workers
    and of their caches. ``is_admin``: it may do what operators do."""

    tenant_id: str
    name: str
    weight: float = 1.0
    limits: TenantLimits = field(default_factory=TenantLimits)
    is_admin: bool = False


# All clients of a gateway without keys.
ANONYMOUS = Tenant("", "anonymous")


class _Usage:
    """What one tenant has under way and has taken lately."""

    def __init__(self) -> None:
        self.num_inside = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.day: Window | None = None
        self._limits = TenantLimits()

    def set_limits(self, limits: TenantLimits, now: float) -> None:
        if limits is self._limits or limits == self._limits:
            return
        self._limits = limits
        self.requests = _resized(self.requests, limits.requests_per_minute, now)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute, now)
        if limits.tokens_per_day is None:
            self.day = None
        elif self.day is None:
            self.day = Window(limits.tokens_per_day, _DAY_S)
        else:
            self.day.limit = limits.tokens_per_day


class TenantLedger:
    """Counts for every tenant. ``now`` is wall clock time in seconds, so that a day is a day."""

    def __init__(self) -> None:
        self._usages: dict[str, _Usage] = {}

    def enter(self, tenant: Tenant, now: float) -> None:
        """One more request; ``leave`` ends it. Raises RATE_LIMITED or QUOTA_EXCEEDED, and then nothing was counted."""
        usage, limits = self._usage(tenant, now), tenant.limits
        if limits.max_concurrent_requests is not None and usage.num_inside >= limits.max_concurrent_requests:
            most = limits.max_concurrent_requests
            raise _limited(f"at most {most} requests at once, and {usage.num_inside} are under way", _SLOT_WAIT_S)
        if usage.requests is not None and (wait_s := usage.requests.wait_s(1.0, now)) > 0:
            raise _limited(f"at most {limits.requests_per_minute} requests per minute", wait_s)
        if usage.tokens is not None and (wait_s := usage.tokens.wait_s(1.0, now)) > 0:
            raise _limited(f"at most {limits.tokens_per_minute} tokens per minute", wait_s)
        if usage.day is not None and usage.day.left(now) <= 0:
            message = f"The quota of this API key is used up: {usage.day.limit} tokens per day (UTC)."
            raise BatonError(ErrorCode.QUOTA_EXCEEDED, message, retry_after_s=usage.day.next_s(now))
        usage.num_inside += 1
        if usage.requests is not None:
            usage.requests.take(1.0, now)

    def leave(self, tenant: Tenant) -> None:
        """A request that had entered has ended."""
        usage = self._usages[tenant.tenant_id]
        usage.num_inside -= 1
        assert usage.num_inside >= 0

    def charge(self, tenant: Tenant, num_tokens: int, now: float) -> None:
        """Counts tokens of a prompt or an answer."""
        if tenant.limits.tokens_per_minute is None and tenant.limits.tokens_per_day is None:
            return
        usage = self._usage(tenant, now)
        if usage.tokens is not None:
            usage.tokens.take(num_tokens, now)
        if usage.day is not None:
            usage.day.take(num_tokens, now)

    def left(self, tenant: Tenant, now: float) -> dict[str, int]:
        """What is left of each limit that the tenant has, by its name; 0 when overdrawn."""
        usage, limits = self._usage(tenant, now), tenant.limits
        left: dict[str, float] = {}
        if limits.max_concurrent_requests is not None:
            left["max_concurrent_requests"] = limits.max_concurrent_requests - usage.num_inside
        if usage.requests is not None:
            left["requests_per_minute"] = usage.requests.level(now)
        if usage.tokens is not None:
            left["tokens_per_minute"] = usage.tokens.level(now)
        if usage.day is not None:
            left["tokens_per_day"] = usage.day.left(now)
        return {name: max(0, int(amount)) for name, amount in left.items()}

    def keep_only(self, tenants: Iterable[Tenant]) -> None:
        """Forgets tenants that are gone and have nothing under way."""
        known = {tenant.tenant_id for tenant in tenants}
        for tenant_id, usage in list(self._usages.items()):
            if tenant_id not in known and not usage.num_inside:
                del self._usages[tenant_id]

    def _usage(self, tenant: Tenant, now: float) -> _Usage:
        usage = self._usages.get(tenant.tenant_id)
        if usage is None:
            usage = self._usages[tenant.tenant_id] = _Usage()
        usage.set_limits(tenant.limits, now)
        return usage


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, _MINUTE_S, now)
    bucket.resize(per_minute, now)
    return bucket


def _limited(limit: str, wait_s: float) -> BatonError:
    return BatonError(ErrorCode.RATE_LIMITED, f"Over the limit of this API key: {limit}.", retry_after_s=wait_s)
