"""Any history of workers, links, outputs and time: one end, no index twice or skipped, nothing left behind, limits kept."""

from __future__ import annotations

from helpers.ladder_world import LadderWorld, decoder, prefiller, tokens
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.ladder import LadderState
from baton.services.core.ladder_steps import LadderLimits, PartOutput
from baton.services.core.request import FinishReason
from baton.services.core.router import Role

MAX_TOKENS = 6
LIMITS = LadderLimits(max_attempts=5, max_pair_attempts=2, max_wait_s=20.0, first_pause_s=0.5)
FAILURES = [
    ErrorCode.HANDOFF_FAILED,
    ErrorCode.INTERNAL,
    ErrorCode.DRAINING,
    ErrorCode.OVERLOADED,
    ErrorCode.WORKER_LOST,
]
# The draw of a token depends on its index alone, as it does in the engine: so a resumed answer is the same answer.
ANSWER = [100 + index for index in range(MAX_TOKENS)]


class LadderHistory(RuleBasedStateMachine):
    """Workers answer, fail, vanish and return, and old attempts speak up again."""

    @initialize(num_prefill=st.integers(0, 3), num_decode=st.integers(0, 3), deadline_s=st.sampled_from([None, 15.0]))
    def begin(self, num_prefill: int, num_decode: int, deadline_s: float | None) -> None:
        workers = [prefiller(f"p{n}") for n in range(num_prefill)] + [decoder(f"d{n}") for n in range(num_decode)]
        self.world = LadderWorld(workers, max_tokens=MAX_TOKENS, deadline_s=deadline_s, limits=LIMITS)
        self.num_made = 0
        self.given: dict[tuple[int, str], int] = {}  # next index that a worker's part of an attempt will send
        self.spoken: list[tuple[int, str]] = []

    @property
    def parts(self) -> list[tuple[int, str]]:
        return sorted(self.world.held)

    def is_running(self) -> bool:
        return self.world.ladder.state is LadderState.RUNNING

    @rule()
    def look(self) -> None:
        self.world.look()
        for part in self.parts:
            self.spoken.append(part)

    @rule(seconds=st.sampled_from([0.1, 0.5, 3.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.apply(self.world.ladder.on_time(self.world.now))

    @rule(is_decode=st.booleans())
    def come(self, is_decode: bool) -> None:
        self.num_made += 1
        make = decoder if is_decode else prefiller
        self.world.come(make(f"new{self.num_made}"))

    @precondition(is_running)
    @rule(data=st.data(), count=st.integers(1, 3))
    def answer(self, data: st.DataObject, count: int) -> None:
        """A part goes on: the prefill worker gives the first token, the decode worker the others, or all of them."""
        number, incarnation = data.draw(st.sampled_from(self.parts))
        attempt = self.world.starts[-1]
        chosen = attempt.attempt.decision.chosen
        begin = len(attempt.token_ids) - 3
        if chosen.prefill is not None and incarnation == chosen.prefill.incarnation:
            if (number, incarnation) in self.given:
                self.world.say(incarnation, PartOutput(handed_over=True))
                return
            first, count = begin, 1
        else:
            first = self.given.get((number, incarnation), begin + (chosen.prefill is not None))
        last = min(first + count, MAX_TOKENS)
        self.given[number, incarnation] = last
        finish = FinishReason.LENGTH if last == MAX_TOKENS else None
        self.world.say(incarnation, PartOutput(tokens(first, *ANSWER[first:last], finish=finish)))

    @precondition(is_running)
    @rule(data=st.data(), code=st.sampled_from(FAILURES), retryable=st.sampled_from([True, True, True, False]))
    def fail(self, data: st.DataObject, code: ErrorCode, retryable: bool) -> None:
        _, incarnation = data.draw(st.sampled_from(self.parts))
        self.world.say(incarnation, PartOutput(error=BatonError(code, "failed", retryable=retryable)))

    @precondition(is_running)
    @rule(data=st.data(), comes_back=st.booleans())
    def lose(self, data: st.DataObject, comes_back: bool) -> None:
        _, incarnation = data.draw(st.sampled_from(self.parts))
        worker = self.world.workers.get(incarnation)
        self.world.lose(incarnation)
        if comes_back and worker is not None:
            self.world.come(worker)

    @rule(role=st.sampled_from(Role))
    def all_of_a_pool_vanish(self, role: Role) -> None:
        """Without a word about this request: their links are found broken later."""
        for incarnation, worker in list(self.world.workers.items()):
            if worker.role is role:
                del self.world.workers[incarnation]

    @precondition(lambda self: self.spoken)
    @rule(data=st.data())
    def speak_late(self, data: st.DataObject) -> None:
        """A part that is over says something: a frozen worker has woken."""
        number, incarnation = data.draw(st.sampled_from(self.spoken))
        if (number, incarnation) in self.world.held:
            return
        before = list(self.world.emitted)
        output = PartOutput(tokens(0, 999, finish=FinishReason.STOP))
        self.world.apply(self.world.ladder.on_output(number, incarnation, output, self.world.now))
        assert self.world.emitted == before

    @precondition(is_running)
    @rule(is_stop=st.booleans())
    def cancel(self, is_stop: bool) -> None:
        self.world.apply(self.world.ladder.on_cancel("stop" if is_stop else "abort"))

    @invariant()
    def tokens_are_right(self) -> None:
        assert self.world.emitted == ANSWER[: len(self.world.emitted)]

    @invariant()
    def limits_are_kept(self) -> None:
        ladder = self.world.ladder
        assert len(self.world.starts) <= LIMITS.max_attempts
        num_pairs = sum(start.attempt.decision.chosen.prefill is not None for start in self.world.starts)
        assert num_pairs <= LIMITS.max_pair_attempts
        assert len(ladder.token_ids) <= MAX_TOKENS
        if not self.is_running():
            assert not self.world.held

    def teardown(self) -> None:
        """Every history ends, when time goes on and nobody says anything any more."""
        if not hasattr(self, "world"):
            return
        for _ in range(60):
            if self.world.end is not None:
                break
            self.world.now += 5.0
            self.world.look()
            for _, incarnation in self.parts:
                if self.is_running():
                    self.world.lose(incarnation)
        self.world.check()
        if self.world.end is not None and self.world.end[0] == "length":
            assert self.world.emitted == ANSWER


TestLadderHistory = LadderHistory.TestCase
TestLadderHistory.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
