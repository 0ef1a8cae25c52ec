"""A prefill worker's requests: each ends once, and whatever ends it, no block stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from helpers.waiting import eventually
from helpers.worker_parts import PEER, Prefill, Reader, cancel, hang_up, make_spec, prefill_running

from baton.api.common.v1 import common_pb2 as pb
from baton.api.prefill.v1 import prefill_pb2
from baton.kvtransfer.errors import TransferCode, TransferError


async def test_a_prompt_goes_over_chunk_by_chunk_and_its_first_token_up_at_once() -> None:
    async with prefill_running(max_num_batched_tokens=8) as prefill:
        prefill.start(make_spec("r", 18))
        handoff = await prefill.handoff()
        await eventually(lambda: handoff.first_token is not None)
        assert sorted(handoff.ready) == [0, 1, 2, 3, 4]
        assert handoff.spec.num_tokens == 18
        assert len(handoff.spec.block_names) == 5
        assert prefill.reader["r"].token_ids == [19]
        assert not prefill.reader["r"].handed_over
        handoff.end(None)
        await eventually(lambda: prefill.reader["r"].handed_over)
        await prefill.assert_clean()


async def test_a_waiting_prompt_reserves_nothing() -> None:
    """Not before its own first step: the blocks over there would wait with it."""
    async with prefill_running(max_num_seqs=1) as prefill:
        prefill.engine.gate.clear()
        prefill.start(make_spec("first"))
        prefill.start(make_spec("second", 11))
        await eventually(prefill.engine.is_in_step.is_set)
        await prefill.handoff()
        assert [handoff.spec.request_id for handoff in prefill.agent.handoffs] == ["first"]
        prefill.engine.gate.set()
        assert (await prefill.handoff(1)).spec.request_id == "second"


async def test_a_single_token_needs_no_receiver() -> None:
    async with prefill_running() as prefill:
        prefill.start(make_spec("r", max_tokens=1))
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        assert prefill.reader["r"].last is not None
        assert prefill.reader["r"].last.finish_reason == pb.FINISH_REASON_LENGTH
        assert not prefill.agent.handoffs
        await prefill.assert_clean()


async def test_a_first_token_that_ends_the_request_withdraws_the_handoff() -> None:
    async with prefill_running() as prefill:
        spec = make_spec("r")
        spec.sampling.stop_token_ids.append(11)
        prefill.start(spec)
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        handoff = await prefill.handoff()
        await eventually(lambda: handoff.is_over)
        assert handoff.first_token is None
        await prefill.assert_clean()


@pytest.mark.parametrize("give_up", [cancel, hang_up])
@pytest.mark.parametrize("phase", ["at once", "first step", "between chunks", "handing over"])
async def test_giving_up_in_any_phase_frees_everything(phase: str, give_up: Callable[[Prefill], None]) -> None:
    async with prefill_running(max_num_batched_tokens=8) as prefill:
        if phase != "handing over":
            prefill.engine.gate.clear()
        prefill.start(make_spec("r", 18))
        if phase == "first step":
            await eventually(prefill.engine.is_in_step.is_set)
        elif phase == "between chunks":
            await prefill.handoff()
        elif phase == "handing over":
            await eventually(lambda: prefill.reader["r"].token_ids == [19])
        give_up(prefill)
        prefill.engine.gate.set()
        await prefill.assert_clean()
        assert all(handoff.is_over for handoff in prefill.agent.handoffs)
        assert not prefill.reader["r"].num_ends  # nobody wants to hear of it any more


@pytest.mark.parametrize("phase", ["computing", "committing"])
async def test_a_handoff_that_fails_is_told_once_as_retryable(phase: str) -> None:
    async with prefill_running(max_num_batched_tokens=8) as prefill:
        if phase == "computing":
            prefill.engine.gate.clear()
        prefill.start(make_spec("r", 18))
        handoff = await prefill.handoff()
        if phase == "committing":
            await eventually(lambda: handoff.first_token is not None)
        handoff.end(TransferError(TransferCode.EXPIRED, "the deadline of the handoff has passed"))
        prefill.engine.gate.set()
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        assert prefill.reader["r"].error_code == "kv_handoff_failed"
        assert prefill.reader["r"].last is not None
        assert prefill.reader["r"].last.error.retryable
        await prefill.assert_clean()


async def test_a_prompt_that_can_never_be_served_is_refused_and_forgotten() -> None:
    async with prefill_running(num_blocks=4, max_model_len=64) as prefill:
        prefill.start(make_spec("long", 64))
        prefill.start(make_spec("large", 20))
        await eventually(lambda: prefill.reader["long"].num_ends + prefill.reader["large"].num_ends == 2)
        assert prefill.reader["long"].error_code == "context_length_exceeded"
        assert prefill.reader["large"].error_code == "context_length_exceeded"
        await prefill.assert_clean()


async def test_a_second_start_of_the_same_attempt_is_refused_and_the_first_goes_on() -> None:
    async with prefill_running() as prefill:
        other = Reader(prefill.worker.open_session(PEER))
        async with other:
            prefill.engine.gate.clear()
            prefill.start(make_spec("r"))
            prefill.worker.start(other.session, prefill_pb2.Start(spec=make_spec("r")))
            await eventually(lambda: other["r"].num_ends == 1)
            assert other["r"].error_code == "invalid_request"
            prefill.engine.gate.set()
            (await prefill.handoff()).end(None)
            await eventually(lambda: prefill.reader["r"].token_ids == [11])
            await prefill.assert_clean()


async def test_a_step_that_fails_ends_its_requests_and_withdraws_their_handoffs() -> None:
    async with prefill_running() as prefill:
        prefill.engine.fails = lambda batch: prefill.engine.num_steps == 1
        prefill.start(make_spec("r"))
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        assert prefill.reader["r"].error_code == "internal_error"
        handoff = await prefill.handoff()
        await eventually(lambda: handoff.is_over)
        prefill.start(make_spec("next"))
        await eventually(lambda: prefill.reader["next"].token_ids == [11])


async def test_a_prompt_whose_time_is_over_before_it_could_run_ends_with_that() -> None:
    async with prefill_running(max_num_seqs=1) as prefill:
        prefill.engine.gate.clear()
        prefill.start(make_spec("runs"))
        await eventually(prefill.engine.is_in_step.is_set)
        late = make_spec("late")
        late.deadline_ms = 100
        prefill.start(late)
        prefill.now_s = 0.2
        prefill.engine.gate.set()
        await eventually(lambda: prefill.reader["late"].num_ends == 1)
        assert prefill.reader["late"].error_code == "deadline_exceeded"


async def test_a_drain_waits_for_the_last_handoff_and_lets_nobody_in() -> None:
    async with prefill_running() as prefill:
        prefill.start(make_spec("r"))
        handoff = await prefill.handoff()
        await eventually(lambda: handoff.first_token is not None)
        drain = asyncio.create_task(prefill.worker.drain())
        await eventually(lambda: prefill.worker.is_draining)
        prefill.start(make_spec("late"))
        await eventually(lambda: prefill.reader["late"].num_ends == 1)
        assert prefill.reader["late"].error_code == "draining"
        assert not drain.done()
        handoff.end(None)
        await drain
        assert prefill.reader["r"].handed_over
        await prefill.assert_clean()


async def test_stopping_ends_what_is_left_and_says_how_much_that_was() -> None:
    async with prefill_running() as prefill:
        for number in range(3):
            prefill.start(make_spec(f"r{number}"))
        await prefill.handoff(2)
        assert await prefill.worker.stop_requests() == 3
        assert all(handoff.is_over for handoff in prefill.agent.handoffs)
        await eventually(lambda: all(prefill.reader[f"r{n}"].num_ends for n in range(3)))
        assert {prefill.reader[f"r{number}"].error_code for number in range(3)} == {"draining"}
        await prefill.assert_clean()
