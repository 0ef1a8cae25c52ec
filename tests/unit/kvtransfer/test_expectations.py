from __future__ import annotations

import asyncio

import pytest
from helpers import kv_names as kv
from helpers.waiting import eventually

from baton.kvtransfer.errors import Fenced, TransferCode, TransferError
from baton.kvtransfer.expectations import Expectations
from baton.kvtransfer.identity import HandoffId, HandoffKey

KEY = kv.HANDOFF.key


def make(wait_s: float = 5.0, max_waiting: int = 10, now: float = 0.0) -> Expectations:
    return Expectations(wait_s, max_waiting, clock=lambda: now)


async def test_everyone_who_waits_for_an_announcement_hears_it() -> None:
    expectations = make()
    waiting = [asyncio.create_task(expectations.wait_for(kv.HANDOFF)) for _ in range(3)]
    await eventually(lambda: expectations._num_waiting == 3)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    expectations.expect(KEY, kv.SENDER, 7.0)
    assert [(await task).deadline_s for task in waiting[1:]] == [7.0, 7.0]
    assert expectations._num_waiting == 0
    assert expectations._waiting == {}


async def test_who_waits_for_what_is_then_forgotten_hears_that() -> None:
    expectations = make()
    waiting = asyncio.create_task(expectations.wait_for(kv.HANDOFF))
    await eventually(lambda: expectations._num_waiting == 1)
    expectations.forget(KEY)
    with pytest.raises(TransferError) as caught:
        await waiting
    assert caught.value.code is TransferCode.ABORTED


async def test_waiting_ends_and_is_bounded() -> None:
    expectations = make(wait_s=0.05, max_waiting=1)
    waiting = asyncio.create_task(expectations.wait_for(kv.HANDOFF))
    await eventually(lambda: expectations._num_waiting == 1)
    with pytest.raises(TransferError) as caught:
        await expectations.wait_for(HandoffId(HandoffKey("other", 1), kv.SENDER, kv.RECEIVER))
    assert caught.value.code is TransferCode.NO_CAPACITY
    with pytest.raises(TransferError) as caught:
        await waiting
    assert caught.value.code is TransferCode.UNKNOWN_HANDOFF


async def test_an_attempt_can_be_announced_again_after_it_was_forgotten() -> None:
    expectations = make()
    expectations.forget(KEY)
    expectations.expect(KEY, kv.SENDER, None)
    assert (await expectations.wait_for(kv.HANDOFF)).sender == kv.SENDER


async def test_older_attempts_are_stale_and_newer_ones_are_waited_for() -> None:
    expectations = make(wait_s=0.02)
    expectations.expect(HandoffKey("req-1", 2), kv.SENDER, None)
    with pytest.raises(Fenced):
        await expectations.wait_for(kv.HANDOFF)
    with pytest.raises(TransferError) as caught:
        await expectations.wait_for(HandoffId(HandoffKey("req-1", 3), kv.SENDER, kv.RECEIVER))
    assert caught.value.code is TransferCode.UNKNOWN_HANDOFF


async def test_announcements_of_requests_that_are_worth_nothing_any_more_are_dropped() -> None:
    now = 0.0
    expectations = Expectations(0.01, 10, clock=lambda: now)
    for number in range(100):
        expectations.expect(HandoffKey(f"r{number}", 1), kv.SENDER, 5.0)
    now = 6.0
    expectations.expect(KEY, kv.SENDER, 20.0)
    assert list(expectations._expected) == [KEY]


def test_what_is_remembered_is_bounded() -> None:
    expectations = make()
    for number in range(10_000):
        expectations.expect(HandoffKey(f"r{number}", 1), kv.SENDER, None)
        expectations.forget(HandoffKey(f"r{number}", 1))
    assert len(expectations._newest) == len(expectations._forgotten) == 8192
    assert expectations._expected == {}
