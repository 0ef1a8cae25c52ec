"""A ladder, the workers that there are, and a book of everything it asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.ladder import Ladder
from baton.services.core.ladder_steps import Command, Emit, End, LadderLimits, PartOutput, Release, Start, Wish
from baton.services.core.request import FinishReason, SampledToken
from baton.services.core.router import Role, RoutedRequest, RoutingDecision, WorkerView, route
from baton.services.core.token_order import TokenDelta

PROMPT = [1, 2, 3]


def prefiller(incarnation: str) -> WorkerView:
    return _view(incarnation, Role.PREFILL)


def decoder(incarnation: str) -> WorkerView:
    return _view(incarnation, Role.DECODE)


def _view(incarnation: str, role: Role) -> WorkerView:
    return WorkerView(
        worker_id=f"id-{incarnation}", incarnation=incarnation, role=role, address="a:1", compatibility="c"
    )


def tokens(first_index: int, *token_ids: int, finish: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(first_index, tuple(map(SampledToken, token_ids)), finish)


class LadderWorld:
    """Carries out what the ladder asks for, and checks it."""

    def __init__(
        self,
        workers: Sequence[WorkerView],
        *,
        max_tokens: int,
        deadline_s: float | None = None,
        limits: LadderLimits | None = None,
        name: str = "r",
    ) -> None:
        self.ladder = Ladder(PROMPT, max_tokens=max_tokens, deadline_s=deadline_s, limits=limits)
        self.now = 0.0
        self.workers = {worker.incarnation: worker for worker in workers}
        self.commands: list[Command] = []
        self.starts: list[Start] = []
        self.emitted: list[int] = []
        self.cancelled: list[tuple[str, bool]] = []  # released with a cancel
        self.end: tuple[str, ErrorCode | None] | None = None
        self.error: BatonError | None = None
        self.held: set[tuple[int, str]] = set()  # started and not released
        self._name = name

    def apply(self, commands: list[Command]) -> None:
        """What a shell does, and what must hold of every command."""
        for command in commands:
            assert self.end is None, f"{command} after the end"
            self.commands.append(command)
            match command:
                case Start(attempt, token_ids):
                    assert not self.held, "an attempt begins while another one runs"
                    assert token_ids == PROMPT + self.emitted
                    self.starts.append(command)
                    self.held = {(attempt.number, w.incarnation) for w in attempt.decision.chosen.workers}
                case Release(number, incarnation, cancel):
                    self.held.remove((number, incarnation))
                    if cancel:
                        self.cancelled.append((incarnation, cancel))
                case Emit(delta):
                    assert delta.first_index == len(self.emitted), "an index is skipped or repeated"
                    self.emitted += [token.token_id for token in delta.tokens]
                case End(outcome, error):
                    assert not self.held, "something is left behind"
                    self.end, self.error = (outcome, error.code if error else None), error

    def look(self) -> None:
        """Shows it the workers when it wants to see them; a wait for a worker is not waited out."""
        if not self.ladder.is_waiting and self.ladder.wants_workers:
            assert self.ladder.wake_s < math.inf, "it would sleep for good"
            self.now = max(self.now, self.ladder.wake_s)
        self.look_now()

    def look_now(self) -> None:
        """Shows the ladder the workers that there are."""
        self.apply(self.ladder.on_workers(self._route, lambda: set(self.workers), self.now))

    def choose(self) -> tuple[str | None, str]:
        """Looks, and it must find some: the incarnations of prefill and decode worker."""
        num_starts = len(self.starts)
        self.look()
        assert len(self.starts) == num_starts + 1, f"no attempt began; the end is {self.end}"
        chosen = self.starts[-1].attempt.decision.chosen
        return (chosen.prefill.incarnation if chosen.prefill else None), chosen.decode.incarnation

    def say(self, incarnation: str, output: PartOutput) -> None:
        self.apply(self.ladder.on_output(self.starts[-1].attempt.number, incarnation, output, self.now))

    def lose(self, incarnation: str) -> None:
        """Its link breaks; it is gone until ``come``."""
        self.workers.pop(incarnation, None)
        error = BatonError(ErrorCode.WORKER_LOST, "lost", retryable=True)
        self.apply(self.ladder.on_lost(self.starts[-1].attempt.number, incarnation, error, self.now))

    def come(self, worker: WorkerView) -> None:
        self.workers[worker.incarnation] = worker

    def check(self) -> None:
        """It has ended, once, with nothing left behind."""
        assert self.end is not None
        assert not self.held
        assert sum(isinstance(command, End) for command in self.commands) == 1

    def _route(self, wish: Wish) -> RoutingDecision:
        request = RoutedRequest(
            request_id=self._name,
            num_tokens=len(PROMPT) + len(self.emitted),
            block_size=16,
            block_bytes=1024,
            cached_blocks={},
            excluded=wish.excluded,
            excluded_pairs=wish.excluded_pairs,
            preferred=wish.preferred,
        )
        return route(request, list(self.workers.values()), wish.placement)
