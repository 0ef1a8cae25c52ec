"""Who of a decode worker's queue has room: seats, blocks to come with, and blocks to grow into."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from baton.services.core.scheduler.base import SchedulerLimits
from baton.services.core.scheduler.block_tables import BlockTables, Plan, Sequence
from baton.services.core.scheduler.growth import GrowthPromises
from baton.services.core.scheduler.incoming import IncomingHandoffs

# Queued prompts that one step looks at; so many cannot all get tokens in it anyway.
MAX_LOOKAHEAD = 16


@dataclass(frozen=True, slots=True)
class Room:
    """The head of the queue that has room, and the first behind it that lacks a seat or blocks."""

    found: list[Sequence]
    blocked: Sequence | None = None


class RoomFinder:
    """Looks and takes nothing."""

    def __init__(
        self, tables: BlockTables, growth: GrowthPromises, incoming: IncomingHandoffs, limits: SchedulerLimits
    ) -> None:
        self._tables = tables
        self._growth = growth
        self._incoming = incoming
        self._limits = limits

    def plan(self, sequence: Sequence) -> Plan:
        """A reservation may find all its full blocks here; a prompt has to compute its last token."""
        if self._incoming.of(sequence) is None:
            return self._tables.plan(sequence)
        return self._tables.plan(sequence, num_hits=sequence.request.num_tokens // self._tables.pool.block_size)

    def unpromised(self, running: Iterable[Sequence], awaiting: Iterable[Sequence]) -> int:
        """Available blocks beyond those that the active ones were promised."""
        return self._tables.pool.num_available - self._growth.outstanding(running, awaiting)

    def find(self, queue: Iterable[Sequence], running: Collection[Sequence], awaiting: Collection[Sequence]) -> Room:
        """The head of the queue, as far as there is room for it to come and to grow.

        In order: behind one that has no room nobody has, or the long would starve.
        """
        found: list[Sequence] = []
        num_prompts = 0
        num_active = len(running) + len(awaiting)
        room = self.unpromised(running, awaiting)
        for sequence in queue:
            if num_active + len(found) >= self._limits.max_num_seqs:
                return Room(found, sequence)
            if num_prompts >= MAX_LOOKAHEAD:
                break
            plan = self.plan(sequence)
            num_blocks = len(plan.hits) + plan.num_new
            sequence.promised_blocks = max(num_blocks, self._growth.promise(sequence.request))
            growth = sequence.promised_blocks - num_blocks
            # Alone it may have everything: there is nobody whom it could drive out.
            is_alone = num_active + len(found) == 0
            if plan.num_taken + (0 if is_alone else growth) > room:
                return Room(found, sequence)
            room -= plan.num_taken + growth
            num_prompts += self._incoming.of(sequence) is None
            found.append(sequence)
        return Room(found)
