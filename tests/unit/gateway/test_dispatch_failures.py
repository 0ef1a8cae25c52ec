"""Workers that fail, vanish and freeze under a request: it goes on elsewhere, rung by rung."""

from __future__ import annotations

import asyncio

import pytest
from helpers.dispatching import (
    PROMPT,
    TRANSFER,
    dispatching,
    fail_handoff,
    hand_over,
    hang_up,
    known_link,
    take_over,
    whole,
)
from helpers.scripted_worker import ScriptedWorker, run_worker, silent
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.router import Role


async def test_a_failed_handoff_goes_elsewhere_and_the_gap_is_closed() -> None:
    def fail_after_the_first(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100)
        worker.fail(spec, ErrorCode.HANDOFF_FAILED)

    async with dispatching((fail_after_the_first,), (take_over,)) as (made, _, (d,)):
        # The decode worker gets nothing in the first attempt: its part is silence.
        d.on_start = lambda worker, spec: whole(worker, spec) if spec.attempt > 1 else None
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        assert made.ended[0].fallbacks == ["local_prefill"]
        assert [attempt.outcome for attempt in made.ended[0].attempts] == ["kv_handoff_failed", "done"]
        # What came is not asked for again.
        assert list(d.starts[-1].spec.token_ids) in ([*PROMPT, 100], PROMPT)
        assert d.starts[-1].spec.num_prompt_tokens == len(PROMPT)
        await eventually(lambda: bool(d.cancels))
        made.assert_done()


@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_prefill_worker_lost_behind_its_handoff_ends_nothing(is_lost: bool) -> None:
    """The acknowledgement was lost, or the worker is: the decode worker has all that it needs."""

    def lose_the_acknowledgement(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100)

    async with dispatching((lose_the_acknowledgement,), (silent,)) as (made, (p,), (d,)):
        generation = made.dispatcher.generate(made.request())
        await anext(generation)
        await eventually(lambda: d.starts)  # the other worker may have been faster
        spec = d.starts[0].spec
        d.say(spec, 1, 101, transfer=TRANSFER)
        await anext(generation)
        rest = asyncio.ensure_future(anext(generation))
        (hang_up if is_lost else fail_handoff)(p, spec)
        link = known_link(made, "prefill-0")
        await eventually(lambda: not link.num_inflight)
        d.say(spec, 2, 102, 103, finish_reason=pb.FINISH_REASON_LENGTH)
        assert len((await rest).tokens) == 2
        assert [delta async for delta in generation] == []
        assert made.ended[0].fallbacks == []
        made.assert_done()


@pytest.mark.parametrize("num_lost", [1, 2])
async def test_a_request_that_lost_two_workers_is_not_tried_on_a_third(num_lost: int) -> None:
    def behave(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt <= num_lost:
            worker.die()
        else:
            whole(worker, spec)

    async with dispatching((), (behave,) * 3) as (made, _, decode):
        generation = made.generate(made.request())
        if num_lost == 1:
            assert await generation == [100, 101, 102, 103]
        else:
            with pytest.raises(BatonError) as failure:
                await generation
            assert failure.value.code is ErrorCode.QUARANTINED
            assert made.ended[0].outcome == "error"
        assert sum(len(worker.starts) for worker in decode) == 2
        made.assert_done()


async def test_a_stream_that_broke_is_waited_for_where_nobody_else_is_there() -> None:
    def hang_up_after_two(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100, 101)
        asyncio.get_running_loop().call_later(0.02, worker.hang_up)

    async with dispatching((), (hang_up_after_two,)) as (made, _, (d,)):
        generation = made.dispatcher.generate(made.request())
        assert (await anext(generation)).first_index == 0
        d.on_start = whole
        rest = [delta async for delta in generation]
        assert [(delta.first_index, len(delta.tokens)) for delta in rest] == [(2, 2)]
        assert made.ended[0].fallbacks == ["queued", "same_workers"]
        assert list(d.starts[-1].spec.token_ids) == [*PROMPT, 100, 101]
        made.assert_done()


async def test_a_request_waits_for_the_first_worker_and_is_counted() -> None:
    async with dispatching() as (made, _, _):
        waiting = asyncio.ensure_future(made.generate(made.request()))
        await eventually(lambda: made.dispatcher.num_waiting == 1)
        async with run_worker("late", Role.DECODE, whole) as worker:
            made.registry.heard(worker.status())
            assert await waiting == [100, 101, 102, 103]
            assert made.dispatcher.num_waiting == 0
            assert made.ended[0].fallbacks == ["queued"]
            made.assert_done()


async def test_a_worker_that_refuses_is_asked_again_after_a_pause() -> None:
    def refuse_twice(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt <= 2:
            worker.fail(spec, ErrorCode.DRAINING)
        else:
            whole(worker, spec)

    async with dispatching((), (refuse_twice,), first_pause_s=0.01) as (made, _, _decode):
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        assert [attempt.outcome for attempt in made.ended[0].attempts] == ["draining", "draining", "done"]
        made.assert_done()


async def test_a_decode_worker_that_fails_leaves_the_prefill_worker_its_prompt() -> None:
    """The prompt is computed already: another decode worker takes it from the same prefill worker."""

    def fail_first(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        (hang_up if spec.attempt == 1 else take_over)(worker, spec)

    async with dispatching((hand_over,) * 4, (fail_first,) * 2) as (made, _, _decode):
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        first, second = (attempt.decision.chosen for attempt in made.ended[0].attempts)
        assert first.prefill is not None
        assert second.prefill is not None
        assert second.prefill.incarnation == first.prefill.incarnation
        assert second.decode.incarnation != first.decode.incarnation
        assert made.ended[0].fallbacks == ["other_decode"]
        made.assert_done()


async def test_a_prefill_worker_that_fails_leaves_the_decode_worker_its_blocks() -> None:
    def fail_first(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        (hang_up if spec.attempt == 1 else hand_over)(worker, spec)

    def take_second(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt > 1:
            take_over(worker, spec)

    async with dispatching((fail_first,) * 2, (take_second,) * 4) as (made, _, _decode):
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        first, second = (attempt.decision.chosen for attempt in made.ended[0].attempts)
        assert second.decode.incarnation == first.decode.incarnation
        assert made.ended[0].fallbacks == ["other_prefill"]
        made.assert_done()


async def test_after_three_pairs_decode_workers_are_asked_to_do_it_alone() -> None:
    async with dispatching((fail_handoff,) * 4, (take_over,)) as (made, _, (d,)):
        d.on_start = lambda worker, spec: None if worker.starts[-1].HasField("prefill") else whole(worker, spec)
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        modes = [attempt.decision.chosen.mode.value for attempt in made.ended[0].attempts]
        assert modes == ["remote", "remote", "remote", "local"]
        assert made.ended[0].fallbacks == ["other_prefill", "other_prefill", "local_prefill"]
        made.assert_done()


async def test_a_worker_that_freezes_is_replaced_and_its_late_tokens_are_not_served() -> None:
    def begin(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt > 1:
            whole(worker, spec)
            return
        worker.say(spec, 0, 100)
        asyncio.get_running_loop().call_later(0.05, worker.freeze)

    async with dispatching((), (begin, begin)) as (made, _, decode):
        generation = made.dispatcher.generate(made.request())
        assert (await anext(generation)).first_index == 0
        (frozen,) = [worker for worker in decode if worker.starts]
        rest = [delta async for delta in generation]
        assert [token.token_id for delta in rest for token in delta.tokens] == [101, 102, 103]
        assert made.ended[0].fallbacks == ["other_decode"]
        frozen.say(frozen.starts[0].spec, 1, 999)
        frozen.wake()
        await eventually(lambda: len(made.registry.views()) == 2, what="its return")
        made.assert_done()
