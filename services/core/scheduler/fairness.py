"""Whose turn it is: tenants share a worker by weight, counted in tokens.

A virtual token counter for each tenant that waits (after Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024, and start-time fair queueing): what is served to a tenant is added to its counter, divided by its weight, and the
tenant with the lowest counter is next. One that comes, or comes back, starts no lower than those who are being served, so
that nobody saves up turns; and a tenant that floods only raises its own counter, so that another one waits for what is
under way and not for the flood.

What one tenant has waiting is ordered by its own priorities, then by urgency. A priority moves nobody else: whose turn it is
does not depend on it, and among tenants that stand alike, and among classes, a request counts by its urgency.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from baton.services.core.scheduler.block_tables import Sequence
from baton.services.core.slo import ServiceLevel

# What a token costs. One that is generated takes a step's share of the batch, one of a prompt only its own computing.
PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0

# Counters kept for tenants with nothing waiting. Beyond that the lowest are forgotten: they lead by the least.
MAX_IDLE_LANES = 1024


@dataclass(slots=True, eq=False)
class _Lane:
    """What one tenant has waiting, in its own order, and what it was served."""

    weight: float
    served: float  # virtual: cost divided by weight
    waiting: list[Sequence] = field(default_factory=list)


class FairQueue:
    """Waiting requests of one class: tenants in turn, each tenant's own by priority, then by urgency."""

    def __init__(self, late_patience_s: float) -> None:
        """A request that is late already has its turn behind the tenant's others for ``late_patience_s`` more."""
        self._late_patience_s = late_patience_s
        self._lanes: dict[str, _Lane] = {}
        self._now_served = 0.0  # where the tenant stood that was last served: newcomers start there
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        level = sequence.request.service
        lane = self._lane(level)
        lane.weight = level.weight
        if not lane.waiting:
            lane.served = max(lane.served, self._now_served)
        insort(lane.waiting, sequence, key=own_order)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.service.tenant
        lane = self._lanes[tenant]
        lane.waiting.remove(sequence)
        self._num_waiting -= 1
        if not lane.waiting and lane.served <= self._now_served:
            del self._lanes[tenant]

    def charge(self, level: ServiceLevel, cost: float, *, begins: bool = False) -> None:
        """A tenant was served. ``begins``: a request of its is about to be taken from the queue."""
        lane = self._lane(level)
        if begins:
            self._now_served = max(self._now_served, lane.served)
        lane.served += cost / level.weight

    def _lane(self, level: ServiceLevel) -> _Lane:
        lane = self._lanes.get(level.tenant)
        if lane is None:
            idle = [(other.served, name) for name, other in self._lanes.items() if not other.waiting]
            if len(idle) >= MAX_IDLE_LANES:
                del self._lanes[min(idle)[1]]
            lane = self._lanes[level.tenant] = _Lane(level.weight, self._now_served)
        return lane

    def in_order(self, now: float, cost_of: Callable[[Sequence], float]) -> Iterator[Sequence]:
        """All, as their turns would come if each cost what ``cost_of`` says. The queue must not change meanwhile."""
        turns: list[tuple[float, tuple[float, int], int, _Lane]] = []
        for lane in self._lanes.values():
            if lane.waiting:
                self._put_late_back(lane, now)
                turns.append((lane.served, urgency(lane.waiting[0]), 0, lane))
        heapq.heapify(turns)
        while turns:
            served, _, index, lane = turns[0]
            sequence = lane.waiting[index]
            yield sequence
            if index + 1 < len(lane.waiting):
                served += cost_of(sequence) / lane.weight
                heapq.heapreplace(turns, (served, urgency(lane.waiting[index + 1]), index + 1, lane))
            else:
                heapq.heappop(turns)

    def _put_late_back(self, lane: _Lane, now: float) -> None:
        """What cannot be in time any more must not make the next ones late as well. Once: then its turn comes in any case."""
        while (first := lane.waiting[0]).can_be_late and first.due_s < now:
            first.can_be_late = False
            first.due_s += self._late_patience_s
            del lane.waiting[0]
            insort(lane.waiting, first, key=own_order)


def own_order(sequence: Sequence) -> tuple[int, float, int]:
    """Among those of one tenant and class."""
    return sequence.request.service.priority, *urgency(sequence)


def urgency(sequence: Sequence) -> tuple[float, int]:
    """Time by which work has to begin, then arrival. It does not depend on now: what waits for long has its turn."""
    return sequence.due_s, sequence.order
