"""Everything that the public API is built from, handed in by the process that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.services.core.errors import ErrorCode
from baton.services.core.tenants import TenantLedger
from baton.services.gateway.admission import Admission
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.generation import Dispatcher, SloTarget
from baton.services.gateway.grammar_checks import GrammarChecker
from baton.services.gateway.limits import Door, Limits
from baton.services.gateway.reasoning import Markers, find_markers
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.session_calls import NoSessions, SessionOperations
from baton.services.gateway.sse import Cut
from baton.services.gateway.tokenizer import ModelTokenizer
from baton.services.gateway.tools.registry import ToolFormat, find_format
from baton.services.gateway.worker_calls import NoWorkers, WorkerOperations


@dataclass(frozen=True, slots=True)
class Refusal:
    """A generation that was refused before the dispatcher saw it."""

    receipt_id: str
    code: ErrorCode
    slo: SloTarget


def _ignore(refusal: Refusal) -> None:
    """Nobody counts."""


@dataclass(slots=True)
class GatewayDeps:
    """``ready`` says whether a usable pair can serve, and why not. ``receipt`` finds a receipt by its client-side id, among
    those of one tenant, or, for None, of all."""

    dispatcher: Dispatcher
    tokenizer: ModelTokenizer
    model: ServedModel
    ready: Callable[[], tuple[bool, str]]
    metrics: Callable[[], bytes]
    workers: Callable[[], list[dict[str, Any]]]
    receipt: Callable[[str, str | None], dict[str, Any] | None]
    decisions: Callable[[], dict[str, Any]] = dict
    authenticator: Authenticator = field(default_factory=Authenticator)
    limits: Limits = field(default_factory=Limits)
    clock: Callable[[], float] = time.monotonic  # seconds; the clock of traces
    wall_clock: Callable[[], float] = time.time  # seconds since 1970; for "created"
    on_refused: Callable[[Refusal], None] = _ignore
    operations: WorkerOperations = field(default_factory=NoWorkers)
    sessions: SessionOperations = field(default_factory=NoSessions)
    tenants: TenantLedger = field(default_factory=TenantLedger)
    cut: Cut = field(default_factory=Cut)
    tool_parser: str = "auto"  # a key of tools.registry.FORMATS, none, or auto: from the chat template
    reasoning_parser: str = "auto"  # the same with reasoning.KINDS
    others_tokens: Callable[[], int] = lambda: 0  # prompt tokens of other gateways that wait on workers, batch aside
    door: Door = field(init=False)
    admission: Admission = field(init=False)
    grammars: GrammarChecker = field(init=False)
    tool_format: ToolFormat | None = field(init=False)
    thoughts: Markers | None = field(init=False)

    def __post_init__(self) -> None:
        self.door = Door(self.limits.max_concurrent_requests)
        self.admission = Admission(
            self.clock,
            self.others_tokens,
            patience_s=self.limits.patience_s,
            max_prompt_tokens=lambda: self.model.max_model_len,
        )
        self.grammars = GrammarChecker(self._grammar_settings)
        template = self.tokenizer.chat_template
        self.tool_format = find_format(self.tool_parser, template)
        self.thoughts = find_markers(self.reasoning_parser, template)

    def _grammar_settings(self) -> dict[str, object]:
        model = self.model
        return {
            "tokenizer": self.tokenizer.as_json(),
            "vocab_size": model.vocab_size,
            "eos": sorted(model.eos_token_ids),
        }
