"""Who is let in: a request that cannot be in time is refused at once, while it has cost nothing.

A gateway sees all that it needs for that: how long its own requests take to their first token against the prompt tokens that
were ahead of them, how long a token takes against the number of streams, and how often a request ends. Two straight lines
and a rate are learned from it, whatever the bottleneck is: workers, links, or the gateway itself.

- The time to the first token of a newcomer is what the first line says for the tokens that wait, itself among them.
- As many streams run as the second line allows for the tightest target among them. Beyond that a request waits here, in front
  of the tokenizer, if its turn comes early enough, and is refused if not. A promise is kept: who waits is not refused later.
- Batch has no target. It waits until there is room, and never takes more than half of it.

A target that could not be met alone counts as one that could, barely: nobody is refused because a model is slow. And where
few requests are inside everybody is let in, so that a wrong line is put right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.services.core.affine import AffineFit
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.slo import CLASS_TARGETS, SloClass

# A stream's pace is measured over so many tokens: shorter, and what arrives together would count as quick.
_MEASURED_TOKENS = 8
_WATCHED_TPOT_MS = CLASS_TARGETS[SloClass.INTERACTIVE].tpot_ms
# To come back after, while nothing has ended yet that would tell how quickly things do.
_UNKNOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How careful to be."""

    always: int = 2  # streams that are let in whatever was learned
    max_waiting: int = 256  # requests in front of the tokenizer
    margin: float = 0.7  # of a target, what may be expected: the rest is for what cannot be foreseen
    batch_share: float = 0.5  # of the streams that may run
    batch_patience_s: float = 120.0  # how long batch that waits gives way
    alone: float = 2.0  # a target below this many times what it takes alone counts as that


@dataclass(slots=True, eq=False)
class Visit:
    """One request, from the door to its end."""

    slo_class: SloClass
    num_tokens: int  # of its prompts, as far as it can be told without a tokenizer
    num_streams: int
    ttft_s: float | None  # left until its first token is late
    tpot_s: float | None
    order: int = 0
    arrival_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    ahead_tokens: int = 0  # when it was let in, its own among them
    num_tokens_out: float = 0.0  # of each stream, on average
    measured_s: float = 0.0  # when its pace was last measured, and after how many tokens of a stream
    measured_tokens: float = 0.0
    has_ended: bool = False

    @property
    def is_batch(self) -> bool:
        return self.slo_class is SloClass.BATCH


@dataclass(slots=True)
class AdmissionControl:
    """Decides; ``now`` in seconds of any steady clock. The caller carries out: lets in, makes wait, refuses."""

    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    num_streams: int = 0  # running
    num_decoding: int = 0  # of these, those that have their first token
    ahead_tokens: int = 0  # of prompts that were let in and have no first token yet; not those of batch
    _ttft: AffineFit = field(default_factory=lambda: AffineFit(least_surprise=0.05))
    _tpot: AffineFit = field(default_factory=lambda: AffineFit(least_surprise=0.02))
    _end_every_s: float = 0.0  # seconds between ends while others waited or ran
    _last_end_s: float | None = None
    _num_batch: int = 0
    _running: set[Visit] = field(default_factory=set)
    _waiting: list[Visit] = field(default_factory=list)
    _num_visits: int = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def arrive(self, visit: Visit, now: float, *, others_tokens: int = 0) -> bool:
        """True: it is let in. False: it waits, and comes out of a later ``end``. Raises OVERLOADED with the time after which
        trying again makes sense. ``others_tokens``: prompt tokens of other gateways that wait on workers."""
        visit.order, visit.arrival_s = self._num_visits, now
        self._num_visits += 1
        ahead = self.ahead_tokens + others_tokens + visit.num_tokens
        is_next = all(self._turn(visit, now) < self._turn(other, now) for other in self._waiting)
        if is_next and self._has_room(visit, now):
            excess_s = 0.0 if self._is_small(visit) else self._ttft.at(ahead) - self._allowed_s(visit)
            if visit.is_batch or excess_s <= 0.0:
                self._let_in(visit, now)
                return True
            raise _overloaded(excess_s, f"its first token would come in about {self._ttft.at(ahead):.2f} s")
        seat_s = self._seat_s(visit, now)
        if not visit.is_batch:
            excess_s = seat_s + self._ttft.at(ahead) - self._allowed_s(visit)
            if excess_s > 0.0:
                raise _overloaded(excess_s, f"its turn would come in about {seat_s:.2f} s")
        if len(self._waiting) >= self.limits.max_waiting:
            raise _overloaded(seat_s or _UNKNOWN_S, f"{len(self._waiting)} requests wait already")
        self._waiting.append(visit)
        return False

    def progress(self, visit: Visit, tokens_per_stream: float, now: float) -> None:
        """So many tokens of each of its streams are there, on average."""
        if visit.admitted_s is None or visit.has_ended:
            return
        visit.num_tokens_out = tokens_per_stream
        if visit.first_token_s is None:
            visit.first_token_s = visit.measured_s = now
            visit.measured_tokens = tokens_per_stream
            self.num_decoding += visit.num_streams
            if not visit.is_batch:
                self.ahead_tokens -= visit.num_tokens
                self._ttft.observe(visit.ahead_tokens, now - visit.admitted_s)
        elif tokens_per_stream - visit.measured_tokens >= _MEASURED_TOKENS:
            self._measure(visit, now)

    def end(self, visit: Visit, now: float) -> list[Visit]:
        """It is over, however: it may have been waiting. Returns those that are let in now. Idempotent."""
        if visit.has_ended:
            return []
        visit.has_ended = True
        if visit.admitted_s is None:
            if visit in self._waiting:
                self._waiting.remove(visit)
            return []
        self._running.discard(visit)
        if visit.first_token_s is None:
            self.ahead_tokens -= 0 if visit.is_batch else visit.num_tokens
        elif 2.0 * (visit.num_tokens_out - visit.measured_tokens) >= _MEASURED_TOKENS:
            self._measure(visit, now)
        self.num_streams -= visit.num_streams
        self.num_decoding -= visit.num_streams if visit.first_token_s is not None else 0
        self._num_batch -= visit.num_streams if visit.is_batch else 0
        self._count_end(now)
        return self._let_in_waiting(now)

    # What is expected.

    def _has_room(self, visit: Visit, now: float) -> bool:
        """Its streams may run beside those that do."""
        if self._is_small(visit):
            return True
        capacity = self._capacity(visit)
        has_share = self._num_batch + visit.num_streams <= capacity * self.limits.batch_share
        if self._gives_way(visit, now) and not has_share:
            return False
        return self.num_streams + visit.num_streams <= capacity

    def _gives_way(self, visit: Visit, now: float) -> bool:
        return visit.is_batch and now < visit.arrival_s + self.limits.batch_patience_s

    def _turn(self, visit: Visit, now: float) -> tuple[bool, float, int]:
        """The smallest is next: who has the least time, then batch that still gives way."""
        patience_s = self.limits.batch_patience_s if visit.ttft_s is None else visit.ttft_s
        return (self._gives_way(visit, now), visit.arrival_s + patience_s, visit.order)

    def _is_small(self, visit: Visit) -> bool:
        return not self._waiting and self.num_streams + visit.num_streams <= self.limits.always

    def _capacity(self, visit: Visit) -> float:
        """Streams that may run at once with ``visit`` among them."""
        targets = [other.tpot_s for other in (visit, *self._running) if other.tpot_s is not None]
        if visit.is_batch and _WATCHED_TPOT_MS is not None:  # there may be nobody who watches, but somebody may come
            targets.append(_WATCHED_TPOT_MS / 1e3)
        if not targets or not self._tpot.is_known:
            return math.inf
        alone_s = self._tpot.at(1.0)
        target_s = max(min(targets) * self.limits.margin, self.limits.alone * alone_s)
        slope = self._tpot.slope
        return math.inf if slope <= 0.0 else 1.0 + (target_s - alone_s) / slope

    def _allowed_s(self, visit: Visit) -> float:
        """Time to the first token that may be expected of it."""
        if visit.ttft_s is None:
            return math.inf
        return max(visit.ttft_s * self.limits.margin, self.limits.alone * self._ttft.at(visit.num_tokens))

    def _seat_s(self, visit: Visit, now: float) -> float:
        """Until its turn comes, at the rate at which requests end."""
        own = self._turn(visit, now)
        return (1 + sum(self._turn(other, now) < own for other in self._waiting)) * self._end_every_s

    # What happens.

    def _let_in(self, visit: Visit, now: float) -> None:
        visit.admitted_s = now
        self._running.add(visit)
        if not visit.is_batch:  # others pass it by
            self.ahead_tokens += visit.num_tokens
        visit.ahead_tokens = self.ahead_tokens
        self.num_streams += visit.num_streams
        self._num_batch += visit.num_streams if visit.is_batch else 0

    def _let_in_waiting(self, now: float) -> list[Visit]:
        entered: list[Visit] = []
        for visit in sorted(self._waiting, key=lambda visit: self._turn(visit, now)):
            if self._running and not self._has_room(visit, now):
                break
            self._waiting.remove(visit)
            self._let_in(visit, now)
            entered.append(visit)
        return entered

    def _measure(self, visit: Visit, now: float) -> None:
        num_tokens = visit.num_tokens_out - visit.measured_tokens
        self._tpot.observe(self.num_decoding, (now - visit.measured_s) / num_tokens)
        visit.measured_s, visit.measured_tokens = now, visit.num_tokens_out

    def _count_end(self, now: float) -> None:
        if self._last_end_s is not None and (self._running or self._waiting):
            interval_s = now - self._last_end_s
            known = self._end_every_s
            self._end_every_s = interval_s if known == 0.0 else 0.9 * known + 0.1 * min(interval_s, 10.0 * known)
        self._last_end_s = now


def _overloaded(retry_after_s: float, why: str) -> BatonError:
    return BatonError(ErrorCode.OVERLOADED, f"the request cannot be in time: {why}", retry_after_s=retry_after_s)
