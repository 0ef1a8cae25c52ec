"""Watches how much of the pool is in quarantine: says that the worker is unhealthy, and has it replaced if that lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from baton.services.core.quarantine import QuarantineBudget, Standing
from baton.services.runtime.health import Health

log = structlog.get_logger(__name__)

# What a process exits with whose quarantine did not drain.
QUARANTINE_STATUS = 88
_LOOK_EVERY_S = 0.5
# Between saying that it is dead and being dead: probes that ask just then are told.
_LAST_WORDS_S = 0.5


class QuarantineWatch:
    """``run`` it as a task. ``problem`` is what is wrong, in words; empty while nothing is.

    ``count`` tells the blocks in quarantine now; ``on_change`` hears when ``problem`` changed. When the worker is lost it
    is drained (``drain``), says that it is dead, and is ended (``end``) whatever hangs: a write may hold a thread.
    """

    def __init__(
        self,
        budget: QuarantineBudget,
        *,
        count: Callable[[], int],
        clock: Callable[[], float],
        health: Health,
        on_change: Callable[[], None],
        drain: Callable[[], Awaitable[object]],
        end: Callable[[int], None],
    ) -> None:
        self.problem = ""
        self._budget = budget
        self._standing = Standing.WITHIN
        self._count = count
        self._clock = clock
        self._health = health
        self._on_change = on_change
        self._drain = drain
        self._end = end

    @property
    def is_lost(self) -> bool:
        """Nothing new comes of it: it is being replaced."""
        return self._standing is Standing.LOST

    async def run(self) -> None:
        """Until cancelled, or the worker is lost."""
        self.look()
        while not self.is_lost:
            await asyncio.sleep(_LOOK_EVERY_S)
            self.look()
        log.error("quarantine did not drain: this process ends, so that it is replaced", reason=self.problem)
        await self._drain()
        self._health.set_dead(self.problem)
        await asyncio.sleep(_LAST_WORDS_S)
        self._end(QUARANTINE_STATUS)

    def look(self) -> None:
        """Once."""
        num_quarantined = self._count()
        standing = self._standing = self._budget.look(num_quarantined, self._clock())
        was_well = not self.problem
        self.problem = "" if standing is Standing.WITHIN else self._budget.explain(num_quarantined)
        if self.problem and was_well:
            log.warning("unhealthy: takes nothing new", reason=self.problem)
            self._health.set_not_ready(self.problem)
            self._on_change()
        elif not self.problem and not was_well:
            log.info("well again: writes have ended")
            self._health.set_ready()
            self._on_change()
