"""One request's path, from its arrival to its one end, as a machine: events in, commands out, ``now`` passed in.

    CHOOSING --on_workers--> RUNNING --last token--> ENDED
       ^                        |
       +---- a part failed -----+---- cannot go on ----> ENDED

A worker's failure costs an attempt, never a token: the next one begins with the prompt and the tokens so far. Rungs, from
the cheapest: another decode worker from the prefill worker's blocks, another prefill worker beside the decode worker's
verified blocks, another pair, a decode worker alone, waiting for a worker, giving up. ``docs/decisions/010`` tells why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.ladder_steps import (
    PAIR_FAILURES,
    PASSING_REFUSALS,
    Alive,
    Attempt,
    Avoided,
    Choose,
    Command,
    Emit,
    End,
    LadderLimits,
    PartOutput,
    Release,
    Rung,
    Start,
    Wish,
    rung_between,
)
from baton.services.core.request import FinishReason
from baton.services.core.router import Placement
from baton.services.core.token_order import TokenDelta, TokenOrder

_RETRY_AFTER_S = 1.0


class LadderState(StrEnum):
    """What the request needs next."""

    CHOOSING = "choosing"  # workers
    RUNNING = "running"  # what they say
    ENDED = "ended"  # nothing


@dataclass(slots=True)
class _Part:
    """A worker that has the attempt and has not ended its part of it."""

    incarnation: str
    is_decode: bool


class Ladder:
    """Every event returns the commands that follow, in order. A ``Start`` is followed, some time, by one ``Release`` for
    each of its workers; after ``End`` nothing comes any more."""

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int,
        deadline_s: float | None,
        placement: Placement = Placement.REMOTE,
        limits: LadderLimits | None = None,
    ) -> None:
        self.limits = limits or LadderLimits()
        self.state = LadderState.CHOOSING
        self.attempts: list[Attempt] = []
        self.fallbacks: list[str] = []
        self.token_ids: list[int] = []  # generated and passed on
        self.failure: BatonError | None = None  # of the last attempt that failed
        self.num_fenced = 0  # outputs of attempts that were over
        self._prompt = list(prompt_token_ids)
        self._max_tokens = max_tokens
        self._deadline_s = math.inf if deadline_s is None else deadline_s
        self._placement = placement
        self._avoided = Avoided(self.limits.first_pause_s)
        self._preferred: frozenset[str] = frozenset()
        self._lost: set[str] = set()  # workers that were lost under this request and have not come back
        self._refusal: BatonError | None = None  # why nobody can take it
        self._wait_until_s: float | None = None
        self._look_s = -math.inf  # when to look for workers next, where none comes before
        self._parts: dict[str, _Part] = {}
        self._order = TokenOrder(0)
        self._decode_goes_on = False

    @property
    def wants_workers(self) -> bool:
        return self.state is LadderState.CHOOSING

    @property
    def is_ended(self) -> bool:
        return self.state is LadderState.ENDED

    @property
    def is_waiting(self) -> bool:
        """Nobody could take the request when it was last tried."""
        return self._wait_until_s is not None

    @property
    def wake_s(self) -> float:
        """When to call ``on_time`` (running) or ``on_workers`` (choosing), where nothing happens before."""
        if self.state is LadderState.RUNNING:
            return self._deadline_s
        return self._look_s if self._wait_until_s is None else min(self._wait_until_s, self._look_s)

    # Events.

    def on_workers(self, choose: Choose, alive: Alive, now: float) -> list[Command]:
        """The workers have changed, or it is time to look at them."""
        if not self.wants_workers or (now < self._look_s and not self.is_waiting):
            return []
        if self._lost:
            self._lost.difference_update(alive())  # a link that broke and came back was no death
        if len(self._lost) >= self.limits.max_lost_workers:
            message = f"{len(self._lost)} workers were lost while they had this request; it is not tried on another"
            return self._end_failed(BatonError(ErrorCode.QUARANTINED, message))
        if now >= self._deadline_s:
            return self._end_failed(self._out_of_time())
        refusal: BatonError | None = None
        for excluded in (self._avoided.all(), self._avoided.at(now)):
            try:
                decision = choose(self._wish(excluded))
            except BatonError as error:
                refusal = error
            else:
                return self._start(Attempt(len(self.attempts) + 1, decision))
        assert refusal is not None
        self._refusal = refusal
        return self._wait(refusal, alive, now)

    def on_output(self, attempt: int, incarnation: str, output: PartOutput, now: float) -> list[Command]:
        """A worker said something. What belongs to an attempt or a part that is over is counted and dropped."""
        part = self._parts.get(incarnation)
        if part is None or self.state is not LadderState.RUNNING or attempt != self.attempts[-1].number:
            self.num_fenced += 1
            return []
        if output.error is not None:
            return self._part_failed(part, output.error, now)
        self._decode_goes_on = self._decode_goes_on or part.is_decode
        commands: list[Command] = []
        delta = output.delta
        if output.handed_over or (delta is not None and delta.finish_reason is not None):
            del self._parts[incarnation]
            commands.append(Release(attempt, incarnation, cancel=False))
        if delta is not None:
            if delta.finish_reason is FinishReason.ABORT:
                error = BatonError(ErrorCode.WORKER_LOST, "the worker gave the request up", retryable=True)
                self._avoided.refused(incarnation, now)
                return commands + self._attempt_failed(part, error, now)
            try:
                ready = self._order.push(delta)
            except BatonError as contradiction:
                return commands + self._attempt_failed(part, contradiction, now)
            for turn in ready:
                commands += self._emit(turn)
                if self.is_ended:
                    return commands
        if not self._parts:
            error = BatonError(ErrorCode.INTERNAL, "the workers ended without the last token", retryable=True)
            self._avoided.refused(incarnation, now)
            commands += self._attempt_failed(part, error, now)
        return commands

    def take_next(self, attempt: int, incarnation: str, first_index: int, token_ids: Sequence[int]) -> bool:
        """``on_output`` for nearly all outputs: a decode worker's next tokens in the middle of a generation, to be passed on.

        False: it is something else, and nothing has changed.
        """
        part = self._parts.get(incarnation)
        if part is None or not part.is_decode or self.state is not LadderState.RUNNING:
            return False
        if attempt != self.attempts[-1].number or not self.token_ids:
            return False
        if len(self.token_ids) + len(token_ids) > self._max_tokens or not self._order.take_next(
            first_index, len(token_ids)
        ):
            return False
        self._decode_goes_on = True
        self.token_ids += token_ids
        return True

    def on_lost(self, attempt: int, incarnation: str, error: BatonError, now: float) -> list[Command]:
        """The link to a worker of this attempt broke."""
        part = self._parts.get(incarnation)
        if part is None or attempt != self.attempts[-1].number:
            return []
        if not self._is_dispensable(part):
            self._lost.add(incarnation)
            self._avoided.lost(incarnation, now)
            self._look_s = now + self.limits.loss_pause_s
        return self._part_failed(part, error, now, is_lost=True)

    def on_time(self, now: float) -> list[Command]:
        """Time has passed."""
        if self.state is not LadderState.RUNNING or now < self._deadline_s:
            return []
        return self._attempt_failed(None, self._out_of_time(), now)

    def on_cancel(self, outcome: str = "abort") -> list[Command]:
        """Whoever asked wants no more: the client is gone, or has all that it wants."""
        if self.is_ended:
            return []
        if self.state is LadderState.RUNNING:
            self.attempts[-1].outcome = "abort" if outcome == "abort" else "done"
        return [*self._release_all(), self._end(outcome)]

    # Between the two.

    def _wish(self, excluded: frozenset[str]) -> Wish:
        is_pair_left = len(self.attempts) < self.limits.max_pair_attempts
        placement = self._placement if is_pair_left else Placement.LOCAL
        return Wish(placement, excluded, frozenset(self._avoided.pairs), self._preferred)

    def _start(self, attempt: Attempt) -> list[Command]:
        chosen = attempt.decision.chosen
        if self._wait_until_s is not None:
            self.fallbacks.append(Rung.QUEUED)
        if self.attempts:
            self.fallbacks.append(rung_between(self.attempts[-1].decision.chosen, chosen))
        self._wait_until_s, self._look_s = None, -math.inf
        self.attempts.append(attempt)
        self._parts = {
            worker.incarnation: _Part(worker.incarnation, worker is chosen.decode) for worker in chosen.workers
        }
        self._order = TokenOrder(len(self.token_ids))
        self._decode_goes_on = False
        self.state = LadderState.RUNNING
        return [Start(attempt, self._prompt + self.token_ids)]

    def _wait(self, refusal: BatonError, alive: Alive, now: float) -> list[Command]:
        """Nobody can take it now: a worker may come, or come back, or have room again."""
        if not refusal.retryable:
            return self._end_failed(refusal)
        self._look_s = self._avoided.next_s(now)
        tried = {attempt.decision.chosen.decode.incarnation for attempt in self.attempts}
        if math.isinf(self._look_s) and any(self._avoided.has_failed(name) for name in tried & set(alive())):
            assert self.failure is not None  # those that are there have tried, and time changes nothing
            return self._end_failed(self.failure)
        if self._wait_until_s is None:
            self._wait_until_s = min(self._deadline_s, now + self.limits.max_wait_s)
        if now < self._wait_until_s:
            return []
        return self._end_failed(self._out_of_time())

    def _emit(self, delta: TokenDelta) -> list[Command]:
        """Passes tokens on. The last ones end the request, on the other worker too."""
        if len(self.token_ids) + len(delta.tokens) > self._max_tokens:
            message = f"a worker sent more than the {self._max_tokens} tokens that were asked for"
            return self._attempt_failed(None, BatonError(ErrorCode.INTERNAL, message), 0.0)
        self.token_ids += [token.token_id for token in delta.tokens]
        if delta.finish_reason is None:
            return [Emit(delta)]
        self.attempts[-1].outcome = "done"
        return [*self._release_all(), Emit(delta), self._end(delta.finish_reason.value)]

    def _is_dispensable(self, part: _Part) -> bool:
        """The prefill worker behind a handoff that succeeded, whatever became of its acknowledgement."""
        return not part.is_decode and self._decode_goes_on and self._order.has_begun

    def _part_failed(self, part: _Part, error: BatonError, now: float, *, is_lost: bool = False) -> list[Command]:
        del self._parts[part.incarnation]
        commands: list[Command] = [Release(self.attempts[-1].number, part.incarnation, cancel=False)]
        if self._is_dispensable(part):
            return commands
        chosen = self.attempts[-1].decision.chosen
        if is_lost:
            pass  # told of already
        elif error.code in PAIR_FAILURES and chosen.prefill is not None:
            self._avoided.pairs.add((chosen.prefill.incarnation, chosen.decode.incarnation))
        elif error.code in PASSING_REFUSALS:
            self._avoided.refused(part.incarnation, now)
        else:
            self._avoided.failed(part.incarnation)
        return commands + self._attempt_failed(part, error, now)

    def _attempt_failed(self, part: _Part | None, error: BatonError, now: float) -> list[Command]:
        """``part``: whose failure it was, if somebody's. The other one holds blocks of this request."""
        attempt = self.attempts[-1]
        attempt.outcome = error.code.value
        commands = self._release_all()
        self.failure = error
        if not error.retryable:
            return commands + self._end_failed(error)
        if len(self.token_ids) >= self._max_tokens:  # all that was asked for is out; only the word that it is was lost
            end = TokenDelta(len(self.token_ids), (), FinishReason.LENGTH)
            return [*commands, Emit(end), self._end(FinishReason.LENGTH.value)]
        if now >= self._deadline_s:
            return commands + self._end_failed(self._out_of_time())
        if attempt.number >= self.limits.max_attempts:
            return commands + self._end_failed(error)
        chosen = attempt.decision.chosen
        if part is not None and chosen.prefill is not None:
            # The pair's own failure too: the prompt is computed there, and another decode worker can have it.
            other = chosen.decode if not part.is_decode and error.code not in PAIR_FAILURES else chosen.prefill
            self._preferred = frozenset({other.incarnation})
        self.state = LadderState.CHOOSING
        return commands

    def _release_all(self) -> list[Command]:
        number = self.attempts[-1].number if self.attempts else 0
        released: list[Command] = [Release(number, incarnation, cancel=True) for incarnation in self._parts]
        self._parts = {}
        return released

    def _out_of_time(self) -> BatonError:
        if self.is_waiting and self._refusal is not None:
            message = self._refusal.message
            return BatonError(ErrorCode.NO_WORKERS, message, retryable=True, retry_after_s=_RETRY_AFTER_S)
        return BatonError(ErrorCode.DEADLINE_EXCEEDED, "the request's time is over")

    def _end_failed(self, error: BatonError) -> list[Command]:
        is_refused = error.code is ErrorCode.NO_WORKERS and not self.attempts
        return [self._end("refused" if is_refused else "error", error)]

    def _end(self, outcome: str, error: BatonError | None = None) -> End:
        self.state = LadderState.ENDED
        return End(outcome, error)
