"""The order in which what waits on a worker has its turn.

Urgency is slack: the time that is left until a request's first token is late, less the time that computing it should take.
Since both sides of that comparison move with the clock, it is kept as the instant when work has to begin (``due_s``), which
only changes once, where that instant passes (see ``FairQueue``). A request without a target is due after a patience of its
own. So whoever waits gets ahead of everybody who comes late enough: nothing starves.

In order: those that were running and had to give their blocks up; then interactive and standard requests, whichever is
more urgent; then batch. A batch request whose patience is over counts as a standard one.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from baton.services.core.scheduler.block_tables import Sequence
from baton.services.core.scheduler.fairness import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, FairQueue, urgency
from baton.services.core.scheduler.pace import Pace
from baton.services.core.slo import SloClass

_URGENT = (SloClass.INTERACTIVE, SloClass.STANDARD)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request may be passed over, in seconds."""

    late_s: float = 10.0  # one that is late already, behind those that can still be in time
    no_target_s: float = 30.0  # one without a target counts as due after this
    batch_s: float = 120.0  # a batch request gives way for as long


def is_yielding(sequence: Sequence) -> bool:
    """It takes what the others leave: batch, while its patience lasts."""
    return sequence.request.service.is_batch and not sequence.is_promoted


def rank(sequence: Sequence) -> tuple[bool, float, int]:
    """Among those that run: the first gets what it needs, the last gives way."""
    return (is_yielding(sequence), *urgency(sequence))


def merged(running: Iterable[Sequence], arrivals: Iterable[Sequence]) -> list[Sequence]:
    """What goes on and what may begin, by rank; the arrivals keep their own order, in which tenants have their turns."""
    together: list[Sequence] = []
    going_on = iter(running)
    following = next(going_on, None)
    for arrival in arrivals:
        while following is not None and rank(following) < rank(arrival):
            together.append(following)
            following = next(going_on, None)
        together.append(arrival)
    return together if following is None else [*together, following, *going_on]


def tokens_left(sequences: Iterable[Sequence]) -> int:
    """Tokens that these still have to compute."""
    return sum(sequence.request.num_uncomputed_tokens for sequence in sequences)


class WaitingQueue:
    """All that waits on one worker."""

    def __init__(self, pace: Pace, patience: Patience, cost_of: Callable[[Sequence], float]) -> None:
        """``cost_of``: what serving a request will probably cost its tenant."""
        self._pace = pace
        self._patience = patience
        self._cost_of = cost_of
        self._classes = {slo_class: FairQueue(patience.late_s) for slo_class in SloClass}
        self._first: list[Sequence] = []  # they ran before
        self._giving_way: list[tuple[float, int, Sequence]] = []  # batch, oldest first; some may have been taken since
        self._by_id: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def values(self) -> Iterator[Sequence]:
        """All, in no particular order."""
        return iter(self._by_id.values())

    def push(self, sequence: Sequence, *, computes: bool = True) -> None:
        """A request has come. ``computes``: its prompt is computed here, which takes its time."""
        request = sequence.request
        level = request.service
        sequence.can_be_late = level.next_token_due_s is not None
        if level.next_token_due_s is not None:
            work_s = self._pace.prefill_s(request.num_uncomputed_tokens) if computes else 0.0
            sequence.due_s = level.next_token_due_s - work_s
        else:
            patience = self._patience
            sequence.due_s = request.arrival_s + (patience.batch_s if level.is_batch else patience.no_target_s)
        self._put(sequence)

    def push_back(self, sequence: Sequence) -> None:
        """A request that ran had to give its blocks up."""
        if is_yielding(sequence):
            self._put(sequence)
        else:
            self._by_id[sequence.request.request_id] = sequence
            insort(self._first, sequence, key=rank)

    def take(self, sequence: Sequence, num_prompt_tokens: int) -> None:
        """Its turn has come: so many tokens of its prompt are computed here."""
        # What a preempted request computes again is not its tenant's fault.
        cost = 0.0 if sequence.request.num_preemptions else PROMPT_TOKEN_COST * num_prompt_tokens
        self._class_of(sequence).charge(sequence.request.service, cost, begins=True)
        self.remove(sequence.request.request_id)

    def remove(self, request_id: str) -> None:
        """It has its turn, or never will. Unknown ones are ignored."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return
        if sequence in self._first:
            self._first.remove(sequence)
        else:
            self._class_of(sequence).remove(sequence)

    def in_order(self, now: float) -> Iterator[Sequence]:
        """All, as they should have their turns. The queue must not change meanwhile."""
        self._promote(now)
        yield from self._first
        urgent = [self._classes[slo_class].in_order(now, self._cost_of) for slo_class in _URGENT]
        yield from _by_urgency(urgent)
        yield from self._classes[SloClass.BATCH].in_order(now, self._cost_of)

    def first(self, now: float) -> Sequence | None:
        return next(self.in_order(now), None)

    def _put(self, sequence: Sequence) -> None:
        self._by_id[sequence.request.request_id] = sequence
        self._class_of(sequence).push(sequence)
        if is_yielding(sequence):
            heapq.heappush(self._giving_way, (sequence.request.arrival_s, sequence.order, sequence))

    def _promote(self, now: float) -> None:
        """Batch that has given way for long enough is in a hurry like everybody."""
        while self._giving_way and self._giving_way[0][0] + self._patience.batch_s <= now:
            sequence = heapq.heappop(self._giving_way)[2]
            if self._by_id.get(sequence.request.request_id) is sequence and is_yielding(sequence):
                self._class_of(sequence).remove(sequence)
                sequence.is_promoted = True
                self._class_of(sequence).push(sequence)

    def _class_of(self, sequence: Sequence) -> FairQueue:
        return self._classes[SloClass.STANDARD if sequence.is_promoted else sequence.request.service.slo_class]

    def charge_output(self, sequence: Sequence) -> None:
        """A token was generated."""
        self._class_of(sequence).charge(sequence.request.service, OUTPUT_TOKEN_COST)


def _by_urgency(turns: list[Iterator[Sequence]]) -> Iterator[Sequence]:
    """Whoever is first in each of several orders, the most urgent of them first."""
    heads = [(urgency(first), index, first) for index, order in enumerate(turns) if (first := next(order, None))]
    heapq.heapify(heads)
    while heads:
        _, index, sequence = heads[0]
        yield sequence
        if (following := next(turns[index], None)) is not None:
            heapq.heapreplace(heads, (urgency(following), index, following))
        else:
            heapq.heappop(heads)
