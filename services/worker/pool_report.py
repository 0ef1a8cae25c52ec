"""What the step thread tells the event loop about its block pool: a few times a second, and every change of names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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

    def on_turn(self, scheduler: Scheduler, now_s: float) -> None:
        events = self._pool.take_events()
        if events.stored or events.removed:
            self._tell(self._on_names, events.stored, events.removed)
        if now_s >= self._next_report_s:
            self._next_report_s = now_s + REPORT_EVERY_S
            self._tell(self._on_report, make_report(self._pool, scheduler, now_s))

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)
