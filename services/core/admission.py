"""Who is let in: a request that cannot be in time is refused at once, while it has cost nothing.

A gateway sees all that it needs for that: how long its own requests take to their first token against the prompt tokens that
were ahead of them, how long a token takes against the number of streams, how often a request ends, and how long its answer was.
Two straight lines, a rate and a length are learned from it, whatever the bottleneck is: workers, links, or the gateway itself.

- The time to the first token of a newcomer is what the first line says for the tokens that wait, itself among them.
- As many streams run as the second line allows for the tightest target among them. Beyond that a request waits here, in front
  of the tokenizer, if its turn comes early enough, and is refused if not. A promise is kept: who waits is not refused later.
  What prompts took of that time counts only where they must be computed: those that a decode worker takes on while it has
  room for them go elsewhere when it has none, so they take no seat.
- Once somebody had to wait or was refused, seats are given at the rate at which they are left, hardly quicker. What begins
  together ends together otherwise: all prompts would be computed at one time, and all answers at another.
- Batch has no target. It waits until there is room, and never takes more than half of it.

A target that could not be met alone counts as one that could, barely: nobody is refused because a model is slow. What it takes
alone is learned from those who were (nearly) alone: a crowd makes everything slow, and is no reason to let in more. And where
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
# Under pressure seats are given this much quicker than they are left, and so many at once.
_QUICKER, _AT_ONCE = 1.25, 3


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
    tenant: str = ""
    priority: int = 0  # among the tenant's own of the class: the lowest first
    order: int = 0
    arrival_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    ahead_tokens: int = 0  # when it was let in, its own among them
    is_lonely: bool = False  # hardly anybody was inside then
    num_tokens_out: float = 0.0  # of each stream, on average
    measured_s: float = 0.0  # when its pace was last measured, and after how many tokens of a stream
    measured_tokens: float = 0.0
    measured_stream_s: float = 0.0  # what all streams together had decoded until then
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
    prompt_share: float = (
        0.0  # of the streams' steps, what prompts take that could be computed elsewhere: the caller says
    )
    ahead_tokens: int = 0  # of prompts that were let in and have no first token yet; not those of batch
    _ttft: AffineFit = field(default_factory=lambda: AffineFit(least_surprise=0.05))
    _tpot: AffineFit = field(default_factory=lambda: AffineFit(least_surprise=0.02))
    _lonely_ttft: AffineFit = field(default_factory=lambda: AffineFit(least_surprise=0.05))
    _lonely_tpot: AffineFit = field(default_factory=lambda: AffineFit(least_surprise=0.02))
    _stay_s: float = 0.0  # how long a request runs
    _num_tokens_out: float = 0.0  # of a stream, when it ends
    _end_every_s: float = 0.0  # seconds between ends while others waited or ran
    _last_end_s: float | None = None
    _pressed_until_s: float = -math.inf  # not everybody was let in a moment ago
    _next_seat_s: float = -math.inf  # for the next one, if seats are given at the rate at which they are left
    _num_batch: int = 0
    _stream_s: float = 0.0  # seconds of all streams that decode, together, until ``_counted_s``
    _counted_s: float = 0.0
    _running: dict[Visit, None] = field(default_factory=dict)  # by when they were let in
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
        is_in = False
        try:
            is_in = self._arrive(visit, now, others_tokens)
        finally:
            if not is_in and not visit.is_batch:
                self._pressed_until_s = now + self._stay_s
        return is_in

    def _arrive(self, visit: Visit, now: float, others_tokens: int) -> bool:
        ahead = self.ahead_tokens + others_tokens + visit.num_tokens
        is_next = self._num_before(visit, now) == 0
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

    @property
    def wake_s(self) -> float | None:
        """When somebody who waits may be let in although nobody ends: call ``look`` then."""
        return self._next_seat_s if self._waiting else None

    def look(self, now: float) -> list[Visit]:
        """Time has passed. Returns those that are let in now."""
        return self._let_in_waiting(now)

    def progress(self, visit: Visit, tokens_per_stream: float, now: float) -> None:
        """So many tokens of each of its streams are there, on average."""
        if visit.admitted_s is None or visit.has_ended:
            return
        visit.num_tokens_out = tokens_per_stream
        if visit.first_token_s is None:
            visit.first_token_s = now
            self._count_decoding(visit.num_streams, now)
            self._measure_from(visit, now)
            if not visit.is_batch:
                self.ahead_tokens -= visit.num_tokens
                self._ttft.observe(visit.ahead_tokens, now - visit.admitted_s)
                if visit.is_lonely:
                    self._lonely_ttft.observe(visit.ahead_tokens, now - visit.admitted_s)
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
        del self._running[visit]
        if visit.first_token_s is None:
            self.ahead_tokens -= 0 if visit.is_batch else visit.num_tokens
        elif 2.0 * (visit.num_tokens_out - visit.measured_tokens) >= _MEASURED_TOKENS:
            self._measure(visit, now)
        self.num_streams -= visit.num_streams
        if visit.first_token_s is not None:
            known = self._num_tokens_out
            self._num_tokens_out = visit.num_tokens_out if known == 0.0 else 0.9 * known + 0.1 * visit.num_tokens_out
            self._count_decoding(-visit.num_streams, now)
            stay_s = now - (visit.admitted_s or 0.0)
            self._stay_s = stay_s if self._stay_s == 0.0 else 0.9 * self._stay_s + 0.1 * stay_s
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
        is_turn = now >= self._pressed_until_s or now >= self._next_seat_s
        return is_turn and self.num_streams + visit.num_streams <= capacity

    def _gives_way(self, visit: Visit, now: float) -> bool:
        return visit.is_batch and now < visit.arrival_s + self.limits.batch_patience_s

    def _turn(self, visit: Visit, now: float) -> tuple[bool, float, int]:
        """The smallest is next: who has the least time, then batch that still gives way."""
        patience_s = self.limits.batch_patience_s if visit.ttft_s is None else visit.ttft_s
        return (self._gives_way(visit, now), visit.arrival_s + patience_s, visit.order)

    def _in_order(self, visits: list[Visit], now: float) -> list[Visit]:
        """By turn. A tenant's turns are its own, and its priorities say which of its requests of a class has which:
        nobody else's turn moves."""
        turns = sorted(visits, key=lambda visit: self._turn(visit, now))
        if not any(visit.priority for visit in turns):
            return turns
        groups: dict[tuple[str, SloClass], list[Visit]] = {}
        for visit in turns:
            groups.setdefault((visit.tenant, visit.slo_class), []).append(visit)
        owners = {key: iter(sorted(group, key=lambda visit: visit.priority)) for key, group in groups.items()}
        return [next(owners[visit.tenant, visit.slo_class]) for visit in turns]

    def _num_before(self, visit: Visit, now: float) -> int:
        """How many of those that wait have their turn before it."""
        if visit.priority or any(other.priority for other in self._waiting):
            return self._in_order([*self._waiting, visit], now).index(visit)
        own = self._turn(visit, now)
        return sum(self._turn(other, now) < own for other in self._waiting)

    def _is_small(self, visit: Visit) -> bool:
        return not self._waiting and self.num_streams + visit.num_streams <= self.limits.always

    def _capacity(self, visit: Visit) -> float:
        """Streams that may run at once with ``visit`` among them."""
        targets = [other.tpot_s for other in (visit, *self._running) if other.tpot_s is not None]
        if visit.is_batch and _WATCHED_TPOT_MS is not None:  # there may be nobody who watches, but somebody may come
            targets.append(_WATCHED_TPOT_MS / 1e3)
        if not targets or not self._tpot.is_known:
            return math.inf
        lonely = self._lonely_tpot if self._lonely_tpot.is_known else self._tpot
        target_s = max(min(targets) * self.limits.margin, self.limits.alone * lonely.at(1.0))
        slope = self._tpot.slope
        return math.inf if slope <= 0.0 else max(1.0, 1.0 + (target_s - self._tpot.at(1.0)) / slope)

    def _allowed_s(self, visit: Visit) -> float:
        """Time to the first token that may be expected of it."""
        if visit.ttft_s is None:
            return math.inf
        lonely = self._lonely_ttft if self._lonely_ttft.is_known else self._ttft
        return max(visit.ttft_s * self.limits.margin, self.limits.alone * lonely.at(visit.num_tokens))

    def _seat_s(self, visit: Visit, now: float) -> float:
        """Until its turn comes: the latest of what tells. The rate at which requests ended lately, which is far off after many
        at once, or at which they end if they run as long as others; where nothing has ended for long, as long again to the next
        end; what those who run have left; and the rate at which seats are given."""
        oldest = next(iter(self._running), None)
        silent_s = 0.0 if oldest is None else now - max(oldest.admitted_s or 0.0, self._last_end_s or 0.0)
        num_before = self._num_before(visit, now)
        every_s = max(self._end_every_s, self._stay_s / max(1, self.num_streams))
        seat_s = max(max(silent_s, every_s) + num_before * every_s, self._left_s(visit, num_before))
        if now < self._pressed_until_s:
            seat_s = max(seat_s, self._next_seat_s - now + num_before * self._spacing_s(visit))
        return seat_s

    def _left_s(self, visit: Visit, num_before: int) -> float:
        """Until so many that run have ended that there is room for it and for those before it: the oldest first, with answers
        as long as others', at the pace of now."""
        num_too_many = self.num_streams + num_before + visit.num_streams - self._capacity(visit)
        pace_s = self._tpot.at(self.num_streams)
        left_s = 0.0
        for other in self._running:
            if num_too_many <= 0.0:
                break
            num_too_many -= other.num_streams
            left_s = max(left_s, (self._num_tokens_out - other.num_tokens_out) * pace_s)
        return left_s

    def _spacing_s(self, visit: Visit) -> float:
        """Between its seat and the next one, where they are given at the rate at which they are left."""
        return self._stay_s / (_QUICKER * self._capacity(visit)) * visit.num_streams

    # What happens.

    def _let_in(self, visit: Visit, now: float) -> None:
        visit.admitted_s = now
        self._running[visit] = None
        seat_s = self._spacing_s(visit)
        self._next_seat_s = max(self._next_seat_s, now - _AT_ONCE * seat_s) + seat_s
        if not visit.is_batch:  # others pass it by
            self.ahead_tokens += visit.num_tokens
        visit.ahead_tokens = self.ahead_tokens
        self.num_streams += visit.num_streams
        visit.is_lonely = self.num_streams <= self.limits.always
        self._num_batch += visit.num_streams if visit.is_batch else 0

    def _let_in_waiting(self, now: float) -> list[Visit]:
        entered: list[Visit] = []
        for visit in self._in_order(self._waiting, now):
            is_small = not self._running or self.num_streams + visit.num_streams <= self.limits.always
            if not is_small and not self._has_room(visit, now):
                break
            self._waiting.remove(visit)
            self._let_in(visit, now)
            entered.append(visit)
        return entered

    def _measure(self, visit: Visit, now: float) -> None:
        """Its pace, beside as many as there were on average. All of them tell of the same time, and count as one: else
        a crowd would make the line forget within a second what it knew of fewer."""
        self._count_decoding(0, now)
        took_s = now - visit.measured_s
        if took_s > 0.0:
            beside = max(1.0, (self._stream_s - visit.measured_stream_s) / took_s)
            pace_s = (1.0 - self.prompt_share) * took_s / (visit.num_tokens_out - visit.measured_tokens)
            self._tpot.observe(beside, pace_s, visit.num_streams / beside)
            if beside <= self.limits.always:
                self._lonely_tpot.observe(beside, pace_s)
        self._measure_from(visit, now)

    def _measure_from(self, visit: Visit, now: float) -> None:
        visit.measured_s, visit.measured_tokens, visit.measured_stream_s = now, visit.num_tokens_out, self._stream_s

    def _count_decoding(self, change: int, now: float) -> None:
        self._stream_s += self.num_decoding * (now - self._counted_s)
        self._counted_s = now
        self.num_decoding += change

    def _count_end(self, now: float) -> None:
        if self._last_end_s is not None and (self._running or self._waiting):
            interval_s = now - self._last_end_s
            known = self._end_every_s
            self._end_every_s = interval_s if known == 0.0 else 0.9 * known + 0.1 * min(interval_s, 10.0 * known)
        self._last_end_s = now


def _overloaded(retry_after_s: float, why: str) -> BatonError:
    return BatonError(ErrorCode.OVERLOADED, f"the request cannot be in time: {why}", retry_after_s=retry_after_s)
