"""The step thread: calls before steps, events in order, steps that fail, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from helpers.scheduling import make_decode, make_request
from helpers.waiting import eventually
from helpers.worker_parts import CountingEngine

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.scheduler.decode import DecodeScheduler
from baton.services.worker.step_loop import MAX_FAILED_STEPS, StepEvents, StepLoop


class Loop:
    """A loop over a decode scheduler, and everything that it told."""

    def __init__(self, on_turn: Callable[[DecodeScheduler, float], None], **limits: Any) -> None:
        self.engine = CountingEngine()
        self.scheduler = make_decode(**limits)
        self.events: list[StepEvents] = []
        self.broken: list[str] = []
        self.steps = StepLoop(
            self.scheduler,
            self.engine,
            loop=asyncio.get_running_loop(),
            on_events=self.events.append,
            on_turn=on_turn,
            on_broken=self.broken.append,
        )

    async def add(self, request_id: str, num_tokens: int = 5, **fields: Any) -> Any:
        request = make_request(request_id, num_tokens, **fields)
        await self.steps.call(lambda scheduler: scheduler.add(request))
        return request

    @property
    def failed(self) -> list[str]:
        return [request.request_id for events in self.events for request, _ in events.failed]

    @property
    def finished(self) -> list[str]:
        return [u.request.request_id for events in self.events for u in events.updates if u.finished]


@asynccontextmanager
async def running(
    on_turn: Callable[[DecodeScheduler, float], None] = lambda scheduler, now_s: None, **limits: Any
) -> AsyncIterator[Loop]:
    loop = Loop(on_turn, **limits)
    loop.steps.start()
    try:
        yield loop
    finally:
        loop.engine.gate.set()
        await loop.steps.stop()


async def test_a_request_runs_to_its_end() -> None:
    async with running() as loop:
        request = await loop.add("a", max_tokens=3)
        await eventually(lambda: loop.finished == ["a"])
        assert request.token_ids == [0, 1, 2, 3, 4, 5, 6, 7]
        assert [events.started for events in loop.events if events.started] == [[request]]
        assert sum(events.num_sampled for events in loop.events) == 3
        assert sum(events.num_prompt_tokens for events in loop.events) == 5


async def test_a_call_returns_or_raises_what_the_step_thread_did() -> None:
    async with running() as loop:
        loop.engine.gate.clear()
        await loop.add("in step", max_tokens=1)
        await eventually(loop.engine.is_in_step.is_set)
        calls = [  # all made during one step, so that no step comes between them
            loop.steps.call(lambda scheduler: scheduler.add(make_request("a", 5))),
            loop.steps.call(lambda scheduler: scheduler.add(make_request("a", 5))),
            loop.steps.call(lambda scheduler: scheduler.abort("a")),
        ]
        loop.engine.gate.set()
        assert await calls[0] is None
        with pytest.raises(BatonError, match="already on this worker"):
            await calls[1]
        assert (await calls[2]) is not None


async def test_a_posted_call_that_raises_stops_nothing() -> None:
    async with running() as loop:
        loop.steps.post(lambda scheduler: scheduler.block_names("nobody"))
        await loop.add("a", max_tokens=1)
        await eventually(lambda: loop.finished == ["a"])
        assert not loop.broken


async def test_what_is_told_by_a_call_comes_before_the_step_that_follows_it() -> None:
    async with running() as loop:
        order: list[str] = []

        def add(scheduler: DecodeScheduler) -> None:
            scheduler.add(make_request("a", 5, max_tokens=1))
            loop.steps.tell(lambda: order.append(f"told with {len(loop.events)} events"))

        await loop.steps.call(add)
        await eventually(lambda: loop.finished == ["a"])
        assert order == ["told with 0 events"]


async def test_a_poisoned_step_fails_what_was_in_it_and_nothing_else() -> None:
    async with running(max_num_seqs=2) as loop:
        loop.engine.fails = lambda batch: any(item.request.request_id == "poison" for item in batch)
        loop.engine.gate.clear()
        await loop.add("before", max_tokens=1)
        await eventually(loop.engine.is_in_step.is_set)
        for request_id in ("poison", "beside", "behind"):  # the last one finds no seat in their step
            loop.steps.post(lambda scheduler, r=request_id: scheduler.add(make_request(r, 5, max_tokens=2)))
        loop.engine.gate.set()
        await eventually(lambda: loop.finished == ["before", "behind"])
        assert loop.failed == ["poison", "beside"]
        assert not loop.broken
        assert await loop.steps.call(lambda scheduler: scheduler.pool.counts().request) == 0


async def test_after_several_failures_in_a_row_the_loop_is_broken_once_and_steps_no_more() -> None:
    async with running() as loop:
        loop.engine.fails = lambda batch: True
        for number in range(MAX_FAILED_STEPS):
            await loop.add(f"r{number}")
            await eventually(lambda n=number: len(loop.failed) == n + 1)
        await eventually(lambda: bool(loop.broken))
        assert loop.failed == ["r0", "r1", "r2"]
        await loop.add("late")  # calls are still answered: the end needs them
        assert await loop.steps.call(lambda scheduler: scheduler.stats().queued) == 1
        assert (len(loop.broken), loop.engine.num_steps) == (1, MAX_FAILED_STEPS)


async def test_a_step_that_works_forgives_the_failures_before() -> None:
    async with running() as loop:
        for number in range(2 * MAX_FAILED_STEPS):
            loop.engine.fails = lambda batch, n=number: n % 2 == 0
            await loop.add(f"r{number}", max_tokens=1)
            await eventually(lambda n=number: len(loop.failed) + len(loop.finished) == n + 1)
        assert not loop.broken


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
async def test_a_step_that_does_not_fit_gives_its_youngest_request_up_and_the_others_finish(error: Exception) -> None:
    async with running() as loop:
        loop.engine.error = error
        loop.engine.fails = lambda batch: len(batch) > 2
        loop.engine.gate.clear()
        await loop.add("first", max_tokens=1)
        await eventually(loop.engine.is_in_step.is_set)
        # All come during one step, so that the next has all of them.
        added = [
            loop.steps.call(
                lambda scheduler, k=k: scheduler.add(make_request(f"r{k}", 5, max_tokens=3, arrival_s=9.0 - k))
            )
            for k in range(5)
        ]
        loop.engine.gate.set()
        await asyncio.gather(*added)
        await eventually(lambda: len(loop.finished) == 3, timeout_s=30.0)
        # Four have a seat, those that came first: r4 to r1, then r0 in the place of r1. Each time the one that came last goes.
        assert loop.failed == ["r1", "r0", "r2"]
        assert sorted(loop.finished) == ["first", "r3", "r4"]
        assert loop.steps.num_out_of_memory == 3
        assert not loop.broken
        assert loop.scheduler.pool.counts().request == 0


async def test_a_request_that_does_not_fit_alone_fails_like_any_other() -> None:
    async with running() as loop:
        loop.engine.error = MemoryError()
        loop.engine.fails = lambda batch: True
        for number in range(MAX_FAILED_STEPS):
            await loop.add(f"r{number}")
            await eventually(lambda n=number: len(loop.failed) == n + 1, timeout_s=30.0)
        await eventually(lambda: bool(loop.broken), timeout_s=30.0)


async def test_a_failure_outside_the_engine_is_told_instead_of_ending_the_thread_in_silence() -> None:
    def on_turn(scheduler: DecodeScheduler, now_s: float) -> None:
        if scheduler.has_work:
            raise RuntimeError("a bug")

    async with running(on_turn) as loop:
        await loop.add("a")
        await eventually(lambda: loop.broken == ["RuntimeError outside the engine"])
        assert await loop.steps.call(lambda scheduler: scheduler.stats().queued) == 1
        assert loop.engine.num_steps == 0


async def test_the_turn_after_the_last_step_comes_without_a_wait() -> None:
    """Whoever watches the pool learns at once that it is empty."""
    turns: list[bool] = []
    async with running(lambda scheduler, now_s: turns.append(scheduler.has_work)) as loop:
        loop.engine.gate.clear()
        await loop.add("a", max_tokens=1)
        await eventually(loop.engine.is_in_step.is_set)
        assert turns[-1]
        loop.engine.gate.set()
        await eventually(lambda: not turns[-1], timeout_s=5.0)


async def test_a_deadline_passes_although_nothing_happens() -> None:
    """A request that waits for room expires by itself."""
    async with running(num_blocks=4, max_num_seqs=1) as loop:
        loop.engine.gate.clear()
        await loop.add("runs", max_tokens=2)
        await eventually(loop.engine.is_in_step.is_set)
        waiting = make_request("waits", 5, deadline_s=0.0)
        loop.steps.post(lambda scheduler: scheduler.add(waiting))
        loop.engine.gate.set()
        await eventually(lambda: any(events.expired == [waiting] for events in loop.events))


async def test_calls_made_before_the_stop_are_answered_and_later_ones_are_refused() -> None:
    async with running() as loop:
        earlier = asyncio.ensure_future(loop.steps.call(lambda scheduler: scheduler.stats().queued))
        await asyncio.sleep(0)
        await loop.steps.stop()
        assert await earlier == 0
        with pytest.raises(BatonError) as failure:
            await loop.steps.call(lambda scheduler: None)
        assert failure.value.code is ErrorCode.DRAINING
