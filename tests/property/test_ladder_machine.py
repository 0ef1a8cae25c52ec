"""Any history of workers, links, outputs and time: one end, no index twice or skipped, nothing left behind, limits kept."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from helpers.ladder_world import PROMPT, LadderWorld, decoder, prefiller, tokens

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.ladder import LadderState
from baton.services.core.ladder_steps import LadderLimits, PartOutput
from baton.services.core.request import FinishReason
from baton.services.core.router import Role

MAX_TOKENS = 6
LIMITS = LadderLimits(max_attempts=5, max_pair_attempts=2, max_wait_s=20.0, first_pause_s=0.5)
FAILURES = [ErrorCode.HANDOFF_FAILED, ErrorCode.INTERNAL, ErrorCode.DRAINING, ErrorCode.OVERLOADED]
# The draw of a token depends on its index alone, as it does in the engine: so a resumed answer is the same answer.
ANSWER = [100 + index for index in range(MAX_TOKENS)]


class History:
    """Workers answer, fail, vanish and return, and old attempts speak up again. ``seed`` decides which and when."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        workers = [prefiller(f"p{n}") for n in range(self.rng.randrange(4))]
        workers += [decoder(f"d{n}") for n in range(self.rng.randrange(4))]
        deadline_s = self.rng.choice([None, None, 15.0])
        self.world = LadderWorld(workers, max_tokens=MAX_TOKENS, deadline_s=deadline_s, limits=LIMITS, name=f"r{seed}")
        self.num_made = 0
        self.given: dict[tuple[int, str], int] = {}  # next index that a worker's part of an attempt will send
        self.begun: list[tuple[int, str]] = []
        self.moves: dict[Callable[[], None], int] = {
            self.look: 6, self.answer: 8, self.lose: 2, self.fail: 2, self.come: 2, self.vanish: 1,
            self.wait: 2, self.speak_late: 2,
        }  # fmt: skip

    def run(self) -> None:
        moves, weights = list(self.moves), list(self.moves.values())
        for _ in range(40):
            self.rng.choices(moves, weights)[0]()
            self.check()
        if self.rng.random() < 0.2:
            self.world.apply(self.world.ladder.on_cancel(self.rng.choice(["stop", "abort"])))
        self.let_end()

    @property
    def parts(self) -> list[tuple[int, str]]:
        return sorted(self.world.held)

    @property
    def is_running(self) -> bool:
        return self.world.ladder.state is LadderState.RUNNING

    def look(self) -> None:
        self.world.look()
        self.begun += self.parts

    def wait(self) -> None:
        self.world.now += self.rng.choice([0.1, 0.5, 3.0])
        self.world.apply(self.world.ladder.on_time(self.world.now))

    def come(self) -> None:
        self.num_made += 1
        self.world.come(self.rng.choice([decoder, prefiller])(f"new{self.num_made}"))

    def answer(self) -> None:
        """A part goes on: the prefill worker gives the first token, the decode worker the others, or all of them."""
        if not self.is_running:
            return
        number, incarnation = self.rng.choice(self.parts)
        attempt = self.world.starts[-1]
        chosen = attempt.attempt.decision.chosen
        first = begin = len(attempt.token_ids) - len(PROMPT)
        count = self.rng.randint(1, 3)
        if chosen.prefill is not None and incarnation == chosen.prefill.incarnation:
            if (number, incarnation) in self.given:
                self.world.say(incarnation, PartOutput(handed_over=True))
                return
            count = 1
        else:
            first = self.given.get((number, incarnation), begin + (chosen.prefill is not None))
        last = min(first + count, MAX_TOKENS)
        self.given[number, incarnation] = last
        finish = FinishReason.LENGTH if last == MAX_TOKENS else None
        self.world.say(incarnation, PartOutput(tokens(first, *ANSWER[first:last], finish=finish)))

    def fail(self) -> None:
        if self.is_running:
            error = BatonError(self.rng.choice(FAILURES), "failed", retryable=self.rng.random() < 0.9)
            self.world.say(self.rng.choice(self.parts)[1], PartOutput(error=error))

    def lose(self) -> None:
        if self.is_running:
            incarnation = self.rng.choice(self.parts)[1]
            worker = self.world.workers.get(incarnation)
            self.world.lose(incarnation)
            if worker is not None and self.rng.random() < 0.5:
                self.world.come(worker)

    def vanish(self) -> None:
        """A pool goes without a word about this request: the links are found broken later."""
        role = self.rng.choice([Role.PREFILL, Role.DECODE])
        self.world.workers = {name: w for name, w in self.world.workers.items() if w.role is not role}

    def speak_late(self) -> None:
        """A part that is over says something: a frozen worker has woken."""
        over = [part for part in self.begun if part not in self.world.held]
        if over:
            number, incarnation = self.rng.choice(over)
            before = list(self.world.emitted)
            output = PartOutput(tokens(0, 999, finish=FinishReason.STOP))
            self.world.apply(self.world.ladder.on_output(number, incarnation, output, self.world.now))
            assert self.world.emitted == before

    def check(self) -> None:
        world, ladder = self.world, self.world.ladder
        assert world.emitted == ANSWER[: len(world.emitted)]
        assert len(world.starts) <= LIMITS.max_attempts
        assert sum(s.attempt.decision.chosen.prefill is not None for s in world.starts) <= LIMITS.max_pair_attempts
        if not self.is_running:
            assert not world.held
        if ladder.wants_workers:
            assert ladder.wake_s <= world.now + LIMITS.max_wait_s, "it sleeps for good"

    def let_end(self) -> None:
        """Every history ends when time goes on and nobody says anything any more."""
        for _ in range(60):
            if self.world.end is not None:
                break
            self.world.now += 5.0
            self.world.look()
            if self.is_running:
                self.world.lose(self.parts[0][1])
            self.check()
        self.world.check()
        if self.world.end is not None and self.world.end[0] == "length":
            assert self.world.emitted == ANSWER


@pytest.mark.parametrize("part", range(4))
def test_every_history_has_one_end_and_the_right_tokens(part: int) -> None:
    ends: Counter[object] = Counter()
    rungs: Counter[str] = Counter()
    for seed in range(600 * part, 600 * (part + 1)):
        history = History(seed)
        history.run()
        ends[history.world.end] += 1
        rungs.update(history.world.ladder.fallbacks)
    # The histories went everywhere.
    assert ends["length", None] > 60
    assert {"error", "abort", "stop", "refused"} <= {str(end[0]) for end in ends}  # type: ignore[index]
    assert {ErrorCode.QUARANTINED, ErrorCode.NO_WORKERS} <= {end[1] for end in ends}  # type: ignore[index]
    assert len(rungs) == 6
