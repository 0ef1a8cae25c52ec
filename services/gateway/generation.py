"""What the API layer asks of the dispatcher: one generation in, token deltas out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from baton.services.core.lifecycle import Instant, Trace
from baton.services.core.request import SamplingParams
from baton.services.core.sessions import SessionTag
from baton.services.core.slo import CLASS_TARGETS, MAX_WEIGHT, MIN_WEIGHT, ServiceLevel, SloClass
from baton.services.core.tenants import ANONYMOUS, Tenant
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.shortcut import Shortcut


@dataclass(frozen=True, slots=True)
class SloTarget:
    """What the client asked for. None: the class's default."""

    slo_class: str = "standard"
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def promised_ttft_ms(self) -> float | None:
        return CLASS_TARGETS[SloClass(self.slo_class)].ttft_ms if self.ttft_ms is None else self.ttft_ms

    @property
    def promised_tpot_ms(self) -> float | None:
        return CLASS_TARGETS[SloClass(self.slo_class)].tpot_ms if self.tpot_ms is None else self.tpot_ms


@dataclass(slots=True)
class GenerationRequest:
    """One choice of one prompt. ``request_id`` is unique; ``receipt_id`` is what the client knows the whole response by."""

    request_id: str
    receipt_id: str
    model: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    slo: SloTarget = field(default_factory=SloTarget)
    tenant: Tenant = ANONYMOUS
    priority: int = 0  # among the tenant's own
    session: SessionTag | None = None  # whose blocks are kept afterwards
    timeout_s: float | None = None
    trace: Trace = field(default_factory=Trace)
    stop_means: str = "stop"  # for the receipt: a choice that calls tools stops with another word
    shortcut: Shortcut | None = None  # past whoever reads what the dispatcher yields, for tokens in the middle

    def service_level(self, now_s: float) -> ServiceLevel:
        """What workers are told. Once a token was given, what is promised is the next one."""
        ttft_ms, tpot_ms = self.slo.promised_ttft_ms, self.slo.promised_tpot_ms
        due_s: float | None = None
        if Instant.FIRST_TOKEN in self.trace.instants:
            due_s = None if tpot_ms is None else now_s + tpot_ms / 1e3
        elif ttft_ms is not None:
            due_s = self.trace.instants.get(Instant.RECEIVED, now_s) + ttft_ms / 1e3
        return ServiceLevel(
            slo_class=SloClass(self.slo.slo_class),
            next_token_due_s=due_s,
            tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
            tenant=self.tenant.tenant_id,
            weight=min(max(self.tenant.weight, MIN_WEIGHT), MAX_WEIGHT),
            priority=self.priority,
        )


class Dispatcher(Protocol):
    """Runs generations on workers.

    Closing the generator before its end cancels the request and frees everything it holds anywhere.
    Failures are raised as BatonError; after a finish reason nothing more is yielded. Tokens may take the request's shortcut,
    where it is open, and are not yielded then.
    """

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]: ...

    def finish(self, request: GenerationRequest, reason: str, num_tokens: int) -> None:
        """The API layer's own end of the request, at a stop string for example, after so many tokens: for the receipt."""
        ...
