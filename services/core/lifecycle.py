"""The instants of a request's life, once: receipts, metrics, spans and simulator traces come from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Instant(StrEnum):
    """What happened, in the order in which it normally happens. Times are the gateway's monotonic clock, in seconds."""

    RECEIVED = "received"  # the first byte of the request was read
    ADMITTED = "admitted"  # validated and let in at the door
    TOKENIZED = "tokenized"  # the prompt is token ids
    ROUTED = "routed"  # workers were chosen
    PREFILL_START = "prefill_start"  # the first step that computes for it begins
    PREFILL_END = "prefill_end"  # the first token is sampled
    TRANSFER_END = "transfer_end"  # its blocks are readable on the decode worker
    DECODE_START = "decode_start"  # the step that makes the first token begins, where decode makes it
    FIRST_TOKEN = "first_token"  # the gateway has the first token
    ENDED = "ended"  # the one end


class Phase(StrEnum):
    """Exclusive parts of the time to first token."""

    ADMISSION = "admission"
    TOKENIZE = "tokenize"
    QUEUE = "queue"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE_WAIT = "decode_wait"
    FIRST_TOKEN = "first_token"


# A phase ends at its instant and begins where the one before ended, so the phases cannot overlap and sum to TTFT.
_PHASE_ENDS: tuple[tuple[Phase, Instant], ...] = (
    (Phase.ADMISSION, Instant.ADMITTED),
    (Phase.TOKENIZE, Instant.TOKENIZED),
    (Phase.QUEUE, Instant.PREFILL_START),
    (Phase.PREFILL, Instant.PREFILL_END),
    (Phase.TRANSFER, Instant.TRANSFER_END),
    (Phase.DECODE_WAIT, Instant.DECODE_START),
    (Phase.FIRST_TOKEN, Instant.FIRST_TOKEN),
)


@dataclass(slots=True)
class Trace:
    """When each instant of one request happened. The first mark of an instant counts; a retry does not move it."""

    instants: dict[Instant, float] = field(default_factory=dict)

    def mark(self, instant: Instant, now_s: float) -> None:
        self.instants.setdefault(instant, now_s)

    def at(self, instant: Instant) -> float | None:
        return self.instants.get(instant)

    def between_ms(self, start: Instant, end: Instant) -> float | None:
        """Milliseconds from ``start`` to ``end``, or None while one of them is missing."""
        first, last = self.at(start), self.at(end)
        return None if first is None or last is None else (last - first) * 1e3

    @property
    def ttft_ms(self) -> float | None:
        return self.between_ms(Instant.RECEIVED, Instant.FIRST_TOKEN)

    @property
    def e2e_ms(self) -> float | None:
        return self.between_ms(Instant.RECEIVED, Instant.ENDED)

    def phases_ms(self) -> dict[Phase, float]:
        """Exclusive phases in milliseconds; their sum is ``ttft_ms``. All zero before the first token.

        An instant that did not happen before the first token (a transfer that went on behind it, say) has length 0, and
        one reported by a worker is held inside the interval that the gateway itself saw.
        """
        received, first_token = self.at(Instant.RECEIVED), self.at(Instant.FIRST_TOKEN)
        if received is None or first_token is None:
            return dict.fromkeys(Phase, 0.0)
        phases: dict[Phase, float] = {}
        begin = received
        for phase, instant in _PHASE_ENDS:
            end = self.at(instant)
            end = begin if end is None else min(max(end, begin), first_token)
            if phase is Phase.FIRST_TOKEN:
                end = first_token
            elif instant is Instant.TRANSFER_END and (self.at(instant) or 0.0) > first_token:
                end = begin
            phases[phase] = (end - begin) * 1e3
            begin = end
        return phases
