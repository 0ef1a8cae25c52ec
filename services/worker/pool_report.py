"""What the step thread tells the event loop about its block pool: a few times a second, and every change of names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import BlockCounts
from baton.services.core.scheduler.base import Scheduler, SchedulerStats

REPORT_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class PoolReport:
    """The pool and the queues at one moment between two steps."""

    counts: BlockCounts
    num_overdue: int
    stats: SchedulerStats

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or is held."""
        counts, stats = self.counts, self.stats
        is_held = counts.request or counts.transfer or counts.quarantine
        return not (is_held or stats.queued or stats.running or stats.awaiting_kv)


def make_report(pool: BlockPool, scheduler: Scheduler, now_s: float) -> PoolReport:
    """To be called on the step thread."""
    return PoolReport(pool.counts(), pool.overdue(now_s), scheduler.stats())


class PoolWatch:
    """Runs on the step thread between steps and hands what it sees to the event loop."""

    def __init__(
        self,
        pool: BlockPool,
        loop: asyncio.AbstractEventLoop,
        *,
        on_report: Callable[[PoolReport], None],
        on_names: Callable[[Sequence[bytes], Sequence[bytes]], None],
    ) -> None:
        self._pool = pool
        self._loop = loop
        self._on_report = on_report
        self._on_names = on_names
        self._next_report_s = 0.0
        self._was_idle = False

    def on_turn(self, scheduler: Scheduler, now_s: float) -> None:
        events = self._pool.take_events()
        if events.stored or events.removed:
            self._tell(self._on_names, events.stored, events.removed)
        is_idle = not scheduler.has_work and self._pool.num_available == self._pool.num_blocks
        # The end of the work is told at once: the next turn may be a while away.
        if now_s >= self._next_report_s or (is_idle and not self._was_idle):
            self._next_report_s = now_s + REPORT_EVERY_S
            self._tell(self._on_report, make_report(self._pool, scheduler, now_s))
        self._was_idle = is_idle

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)
