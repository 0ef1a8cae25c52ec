"""What the step thread tells of its pool, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog.testing
from helpers.scheduling import make_decode, make_request

from baton.services.core.block_state import Hold, Owner
from baton.services.worker.pool_report import AUDIT_EVERY_S, REPORT_EVERY_S, LedgerAudit, PoolReport, PoolWatch


class Watched:
    def __init__(self) -> None:
        self.scheduler = make_decode()
        self.reports: list[PoolReport] = []
        self.names: list[tuple[Sequence[bytes], Sequence[bytes]]] = []
        self.watch = PoolWatch(
            self.scheduler.pool,
            LedgerAudit(self.scheduler.pool),
            asyncio.get_running_loop(),
            on_report=self.reports.append,
            on_names=lambda stored, removed: self.names.append((stored, removed)),
        )

    async def turn(self, now_s: float) -> int:
        """Number of reports so far."""
        self.watch.on_turn(self.scheduler, now_s)
        await asyncio.sleep(0)
        return len(self.reports)


async def test_reports_come_at_a_steady_pace() -> None:
    watched = Watched()
    watched.scheduler.add(make_request("a", 50))
    turns = [await watched.turn(now_s) for now_s in (1.0, 1.0, 1.0 + REPORT_EVERY_S / 2, 1.0 + 1.5 * REPORT_EVERY_S)]
    assert turns == [1, 1, 1, 2]


async def test_the_end_of_the_work_is_reported_at_once() -> None:
    watched = Watched()
    watched.scheduler.add(make_request("a", 50))
    watched.scheduler.schedule(1.0)
    assert await watched.turn(1.0) == 1
    assert not watched.reports[-1].is_idle
    watched.scheduler.abort("a")
    assert await watched.turn(1.0) == 2
    assert watched.reports[-1].is_idle
    assert await watched.turn(1.0) == 2  # and once


async def test_names_that_came_are_told_between_steps() -> None:
    watched = Watched()
    pool = watched.scheduler.pool
    (block_id,) = pool.allocate(1, Hold(Owner.REQUEST, "a"))
    pool.name_block(block_id, b"n" * 16)
    await watched.turn(1.0)
    await watched.turn(1.0)
    assert watched.names == [((b"n" * 16,), ())]


async def test_a_request_that_waits_and_blocks_in_quarantine_are_not_idle() -> None:
    watched = Watched()
    pool = watched.scheduler.pool

    def is_idle() -> bool:
        return LedgerAudit(pool).report(watched.scheduler, 0.0).is_idle

    assert is_idle()
    watched.scheduler.add(make_request("a", 5))
    assert not is_idle()
    watched.scheduler.abort("a")
    hold = Hold(Owner.TRANSFER, "b")
    blocks = pool.allocate(2, hold)
    assert not is_idle()
    pool.quarantine(blocks, hold)
    assert not is_idle()
    pool.release_quarantine(blocks)
    assert is_idle()


async def test_a_recount_that_contradicts_the_counters_is_an_error_and_one_line_with_the_blocks() -> None:
    watched = Watched()
    pool = watched.scheduler.pool
    await watched.turn(1.0)
    assert watched.reports[-1].ledger_error == 0
    pool.allocate(3, Hold(Owner.REQUEST, "a"))
    block_id = pool._free[-1]
    pool._blocks[block_id].request_refs = 1  # a bug: nobody counted it
    with structlog.testing.capture_logs() as logs:
        await watched.turn(1.0 + AUDIT_EVERY_S / 2)
        assert watched.reports[-1].ledger_error == 0  # not looked at yet
        for k in range(1, 4):
            await watched.turn(1.0 + k * AUDIT_EVERY_S)
    assert watched.reports[-1].ledger_error == 1
    assert len(logs) == 1
    assert any(f"blocks {block_id} are free" in line for line in logs[0]["contradictions"])
    pool._blocks[block_id].request_refs = 0
    await watched.turn(1.0 + 5 * AUDIT_EVERY_S)
    assert watched.reports[-1].ledger_error == 0
