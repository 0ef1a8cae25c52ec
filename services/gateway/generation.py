"""What the API layer asks of the dispatcher: one generation in, token deltas out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from baton.services.core.lifecycle import Trace
from baton.services.core.request import SamplingParams
from baton.services.core.tenants import ANONYMOUS, Tenant
from baton.services.core.token_order import TokenDelta


@dataclass(frozen=True, slots=True)
class SloTarget:
    """What the client asked for. None: the class's default."""

    slo_class: str = "standard"
    ttft_ms: float | None = None
    tpot_ms: float | None = None


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
    timeout_s: float | None = None
    trace: Trace = field(default_factory=Trace)
    stop_means: str = "stop"  # for the receipt: a choice that calls tools stops with another word


class Dispatcher(Protocol):
    """Runs generations on workers.

    Closing the generator before its end cancels the request and frees everything it holds anywhere.
    Failures are raised as BatonError; after a finish reason nothing more is yielded.
    """

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]: ...

    def finish(self, request: GenerationRequest, reason: str) -> None:
        """The API layer's own end of the request, at a stop string for example: for the receipt."""
        ...
