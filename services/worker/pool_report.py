"""What the step thread tells the event loop about its block pool: a few times a second, and every change of names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import BlockCounts
from baton.services.core.scheduler.base import Scheduler, SchedulerStats

log = structlog.get_logger(__name__)

REPORT_EVERY_S = 0.1
AUDIT_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class PoolReport:
    """The pool and the queues at one moment between two steps."""

    counts: BlockCounts
    num_overdue: int
    stats: SchedulerStats
    ledger_error: int = 0  # 0, or a bug: blocks unaccounted for, or 1 where a recount found a contradiction
    num_sessions: int = 0  # conversations whose time is not over
    num_kept: int = 0  # blocks that they keep
    num_tenants: int = 0  # that have something in the pool
    num_evicted_for_own: int = 0  # cached blocks that made room for their own tenant
    num_evicted_for_others: int = 0

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or is held."""
        counts, stats = self.counts, self.stats
        is_held = counts.request or counts.transfer or counts.quarantine
        return not (is_held or stats.queued or stats.running or stats.awaiting_kv)


def add_report(status: pb.WorkerStatus, report: PoolReport, block_bytes: int = 0) -> None:
    """What the report says, in the status that others see."""
    status.sessions = report.num_sessions
    status.retained_bytes = report.num_kept * block_bytes
    status.cache_tenants = report.num_tenants
    status.evicted_for_own_total = report.num_evicted_for_own
    status.evicted_for_others_total = report.num_evicted_for_others
    counts, stats = report.counts, report.stats
    status.kv_blocks.total = counts.total
    status.kv_blocks.free = counts.free
    status.kv_blocks.cached = counts.cached
    status.kv_blocks.request = counts.request
    status.kv_blocks.transfer = counts.transfer
    status.kv_blocks.quarantine = counts.quarantine
    status.overdue = report.num_overdue
    status.ledger_error = report.ledger_error
    status.queued = stats.queued
    status.running = stats.running
    status.answering = stats.answering
    status.queued_tokens = stats.queued_tokens
    status.batch_queued_tokens = stats.batch_queued_tokens
    status.preemptions_total = stats.preemptions_total


class LedgerAudit:
    """Recounts a pool from time to time. Belongs to the step thread."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        # A block takes about a microsecond, and steps wait meanwhile: a thousandth of the time is for this.
        self._every_s = max(AUDIT_EVERY_S, pool.num_blocks * 1e-3)
        self._next_s = 0.0
        self._contradictions: list[str] = []

    def run_if_due(self, now_s: float) -> None:
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._every_s
        contradictions = list(self._pool.contradictions())
        if contradictions and contradictions != self._contradictions:
            log.error("the block ledger contradicts itself", contradictions=contradictions)
        self._contradictions = contradictions

    @property
    def found(self) -> bool:
        """The last recount found that something is wrong."""
        return bool(self._contradictions)

    def report(self, scheduler: Scheduler, now_s: float) -> PoolReport:
        counts = self._pool.counts()
        error = counts.error or int(self.found)
        retention = self._pool.retention
        retention.lapse(now_s)
        return PoolReport(
            counts,
            self._pool.overdue(now_s),
            scheduler.stats(),
            error,
            num_sessions=retention.num_sessions,
            num_kept=retention.num_kept,
            num_tenants=len(self._pool.shares),
            num_evicted_for_own=self._pool.num_evicted_for_own,
            num_evicted_for_others=self._pool.num_evicted_for_others,
        )


class PoolWatch:
    """Runs on the step thread between steps and hands what it sees to the event loop."""

    def __init__(
        self,
        pool: BlockPool,
        audit: LedgerAudit,
        loop: asyncio.AbstractEventLoop,
        *,
        on_report: Callable[[PoolReport], None],
        on_names: Callable[[Sequence[bytes], Sequence[bytes]], None],
    ) -> None:
        self._pool = pool
        self._audit = audit
        self._loop = loop
        self._on_report = on_report
        self._on_names = on_names
        self._next_report_s = 0.0
        self._was_idle = False

    def on_turn(self, scheduler: Scheduler, now_s: float) -> None:
        self._pool.now_s = now_s
        self._audit.run_if_due(now_s)
        events = self._pool.take_events()
        if events.stored or events.removed:
            self._tell(self._on_names, events.stored, events.removed)
        is_idle = not scheduler.has_work and self._pool.num_available == self._pool.num_blocks
        # The end of the work is told at once: the next turn may be a while away.
        if now_s >= self._next_report_s or (is_idle and not self._was_idle):
            self._next_report_s = now_s + REPORT_EVERY_S
            self._tell(self._on_report, self._audit.report(scheduler, now_s))
        self._was_idle = is_idle

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)
