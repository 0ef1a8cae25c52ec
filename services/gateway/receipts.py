"""Receipts: what was decided for a request, what it was predicted to take, what it took."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.ladder_steps import Attempt
from baton.services.core.lifecycle import Trace
from baton.services.core.regret import Comparison
from baton.services.core.router import Candidate, RoutingDecision
from baton.services.gateway.generation import GenerationRequest, SloTarget

MAX_RECEIPTS = 10_000


@dataclass(slots=True)
class GenerationRecord:
    """What one generation (one choice of one prompt) did."""

    request_id: str
    prompt_tokens: int
    trace: Trace
    slo: SloTarget
    is_first: bool = True  # of its response's generations: the one whose figures count for the response
    attempts: list[Attempt] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    cached_tokens: int = 0
    computed_tokens: int = 0  # of the prompt, by the worker that prefilled it
    completion_tokens: int = 0
    second_token_s: float | None = None  # when that came, where it did not come with the first
    transfer: pb.TransferReport | None = None
    fetch: pb.FetchReport | None = None
    outcome: str | None = None  # the one end
    comparison: Comparison | None = None  # with the way that was not chosen, where there was one

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds per output token after the first; None with fewer than two tokens."""
        e2e_ms, ttft_ms = self.trace.e2e_ms, self.trace.ttft_ms
        if self.completion_tokens < 2 or e2e_ms is None or ttft_ms is None:
            return None
        return (e2e_ms - ttft_ms) / (self.completion_tokens - 1)

    @property
    def slo_ttft_ms(self) -> float | None:
        return self.slo.promised_ttft_ms

    @property
    def slo_tpot_ms(self) -> float | None:
        return self.slo.promised_tpot_ms

    @property
    def missed_because(self) -> str:
        """Which part of the target was missed: "error", "ttft" or "tpot". For records that are not ``slo_met``."""
        if self.outcome not in ("stop", "length", "tool_calls"):
            return "refused" if self.outcome == "refused" else "error"
        ttft_ms = self.trace.ttft_ms
        return "ttft" if self.slo_ttft_ms is not None and (ttft_ms or 0.0) > self.slo_ttft_ms else "tpot"

    @property
    def slo_met(self) -> bool:
        """A bad end misses; a target that is not set, or a figure that one token cannot have, is met."""
        if self.outcome not in ("stop", "length", "tool_calls"):
            return False
        ttft_ms = self.trace.ttft_ms
        ttft_met = self.slo_ttft_ms is None or (ttft_ms is not None and ttft_ms <= self.slo_ttft_ms)
        return ttft_met and (self.slo_tpot_ms is None or self.tpot_ms is None or self.tpot_ms <= self.slo_tpot_ms)


@dataclass(slots=True)
class _Response:
    """What one receipt is about: all generations of one request of a client."""

    response_id: str
    model: str
    records: list[GenerationRecord] = field(default_factory=list)


class ReceiptBook:
    """The newest receipts by the id that the client knows. A response with several choices is one receipt."""

    def __init__(self, on_end: Callable[[GenerationRecord], None], max_receipts: int = MAX_RECEIPTS) -> None:
        self._on_end = on_end
        self._max_receipts = max_receipts
        self._by_receipt: OrderedDict[tuple[str, str], _Response] = OrderedDict()  # by tenant and id, oldest first

    def open(self, request: GenerationRequest) -> GenerationRecord:
        """Starts the record of one generation."""
        record = GenerationRecord(request.request_id, len(request.prompt_token_ids), request.trace, request.slo)
        # The choices of one response differ behind the last dot. A client that uses its id again means another response.
        response_id = request.request_id.rpartition(".")[0]
        key = (request.tenant.tenant_id, request.receipt_id)
        response = self._by_receipt.get(key)
        if response is None or response.response_id != response_id:
            response = self._by_receipt[key] = _Response(response_id, request.model)
        record.is_first = not response.records
        response.records.append(record)
        self._by_receipt.move_to_end(key)
        while len(self._by_receipt) > self._max_receipts:
            self._by_receipt.popitem(last=False)
        return record

    def end(self, record: GenerationRecord, outcome: str) -> None:
        """The one end of a record; a second one is ignored."""
        if record.outcome is None:
            record.outcome = outcome
            self._on_end(record)

    def get(self, receipt_id: str, tenant_id: str | None = None) -> dict[str, object] | None:
        """Of one tenant; for None the newest of that name, whosever it is."""
        if tenant_id is not None:
            found = self._by_receipt.get((tenant_id, receipt_id))
        else:
            newest = (response for key, response in reversed(self._by_receipt.items()) if key[1] == receipt_id)
            found = next(newest, None)
        return None if found is None else render_receipt(receipt_id, found.model, found.records)


def render_receipt(receipt_id: str, model: str, records: Sequence[GenerationRecord]) -> dict[str, object]:
    """The receipt of the contract. With several choices the figures are the first one's and tokens are summed."""
    first = records[0]
    receipt: dict[str, object] = {
        "id": receipt_id,
        "model": model,
        "outcome": first.outcome or "running",
        "slo": {
            "class": first.slo.slo_class,
            "ttft_ms": first.slo_ttft_ms,
            "tpot_ms": first.slo_tpot_ms,
            "met": first.slo_met,
        },
        "decision": _render_decision(first.attempts[-1].decision, first.comparison) if first.attempts else None,
        "phases_ms": {phase.value: round(length, 3) for phase, length in first.trace.phases_ms().items()},
        "ttft_ms": _rounded(first.trace.ttft_ms),
        "tpot_ms": _rounded(first.tpot_ms),
        "e2e_ms": _rounded(first.trace.e2e_ms),
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": first.cached_tokens,
        "completion_tokens": sum(record.completion_tokens for record in records),
        "transfer": _render_transfer(first.transfer),
        "fetch": _render_fetch(first.fetch),
        "retries": sum(max(0, len(record.attempts) - 1) for record in records),
        "fallbacks": [reason for record in records for reason in record.fallbacks],
        "attempts": [_render_attempt(attempt) for attempt in first.attempts],
    }
    if len(records) > 1:
        receipt["choices"] = [
            {
                "request_id": record.request_id,
                "outcome": record.outcome or "running",
                "completion_tokens": record.completion_tokens,
                "cached_tokens": record.cached_tokens,
                "ttft_ms": _rounded(record.trace.ttft_ms),
            }
            for record in records
        ]
    return receipt


def _render_decision(decision: RoutingDecision, comparison: Comparison | None) -> dict[str, object]:
    chosen = _render_candidate(decision.chosen)
    runner_up = _render_candidate(decision.runner_up) if decision.runner_up else None
    other_way = _render_candidate(decision.other_way) if decision.other_way else None
    regret_s = None if comparison is None else comparison.regret_s
    return {
        **chosen,
        "runner_up": runner_up,
        "other_way": other_way,
        "regret_ms": None if regret_s is None else _rounded(regret_s * 1e3),
        "reason": decision.reason,
    }


def _render_candidate(candidate: Candidate) -> dict[str, object]:
    return {
        "mode": candidate.mode.value,
        "prefill": candidate.prefill.worker_id if candidate.prefill else None,
        "decode": candidate.decode.worker_id,
        "predicted_ttft_ms": round(candidate.ttft_s * 1e3, 3),
    }


def _render_transfer(report: pb.TransferReport | None) -> dict[str, object] | None:
    if report is None:
        return None
    seconds = report.duration_ms / 1e3
    return {
        "path": report.transport,
        "blocks": report.num_blocks,
        "blocks_skipped": report.num_blocks_skipped,
        "bytes": report.num_bytes,
        "gb_per_s": round(report.num_bytes / seconds / 1e9, 3) if seconds > 0 else 0.0,
        "checksum": report.checksum,
        "fallbacks": list(report.fallbacks),
        "duration_ms": round(report.duration_ms, 3),
        "commit_ms": round(report.commit_ms, 3),
        "reserve_wait_ms": round(report.reserve_wait_ms, 3),
    }


def _render_fetch(report: pb.FetchReport | None) -> dict[str, object] | None:
    if report is None:
        return None
    return {
        "from": report.holder,
        "path": report.transport or None,
        "blocks": report.num_blocks,
        "blocks_skipped": report.num_blocks_skipped,
        "bytes": report.num_bytes,
        "duration_ms": round(report.duration_ms, 3),
        "error": report.error.code if report.HasField("error") else None,
    }


def _render_attempt(attempt: Attempt) -> dict[str, object]:
    chosen = attempt.decision.chosen
    return {
        "attempt": attempt.number,
        "mode": chosen.mode.value,
        "prefill": chosen.prefill.worker_id if chosen.prefill else None,
        "decode": chosen.decode.worker_id,
        "outcome": attempt.outcome,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
