"""What comes to a prefill worker without a decode worker is answered there to the end, beside what is handed over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from helpers.waiting import eventually
from helpers.worker_parts import Prefill, cancel, hang_up, make_spec, prefill_running

from baton.api.common.v1 import common_pb2 as pb


async def test_it_is_answered_to_its_end_and_nobody_is_asked_for_slots() -> None:
    async with prefill_running(max_num_batched_tokens=8) as prefill:
        prefill.start_whole(make_spec("r", 18, max_tokens=5))
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        assert prefill.reader["r"].token_ids == [19, 20, 21, 22, 23]
        assert prefill.reader["r"].last is not None
        assert prefill.reader["r"].last.finish_reason == pb.FINISH_REASON_LENGTH
        assert not prefill.agent.handoffs
        assert not prefill.reader["r"].handed_over
        await prefill.assert_clean()


async def test_a_stop_token_ends_it() -> None:
    async with prefill_running() as prefill:
        spec = make_spec("r", 10, max_tokens=9)
        spec.sampling.stop_token_ids.append(13)
        prefill.start_whole(spec)
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        assert prefill.reader["r"].token_ids == [11, 12, 13]
        assert prefill.reader["r"].last is not None
        assert prefill.reader["r"].last.stop_token_id == 13


async def test_answers_and_handoffs_run_beside_each_other() -> None:
    async with prefill_running(max_num_batched_tokens=8) as prefill:
        prefill.engine.gate.clear()
        for number in range(2):
            prefill.start_whole(make_spec(f"whole{number}", 9, max_tokens=6))
            prefill.start(make_spec(f"over{number}", 18))
        prefill.engine.gate.set()
        for number in range(2):
            handoff = await prefill.handoff(number)
            await eventually(lambda handoff=handoff: handoff.first_token is not None)  # type: ignore[misc]
            handoff.end(None)
        await eventually(lambda: all(prefill.reader[f"whole{number}"].num_ends for number in range(2)))
        await eventually(lambda: all(prefill.reader[f"over{number}"].handed_over for number in range(2)))
        assert prefill.reader["whole1"].token_ids == [10, 11, 12, 13, 14, 15]
        assert prefill.reader["over1"].token_ids == [19]
        assert {handoff.spec.request_id for handoff in prefill.agent.handoffs} == {"over0", "over1"}
        await prefill.assert_clean()


@pytest.mark.parametrize("give_up", [cancel, hang_up])
@pytest.mark.parametrize("phase", ["at once", "first step", "answering"])
async def test_giving_up_in_any_phase_frees_everything(phase: str, give_up: Callable[[Prefill], None]) -> None:
    async with prefill_running(max_num_batched_tokens=8) as prefill:
        prefill.engine.gate.clear()
        prefill.start_whole(make_spec("r", 18, max_tokens=40))
        if phase != "at once":
            await eventually(prefill.engine.is_in_step.is_set)
        if phase == "answering":
            prefill.engine.closes_after = 7
            prefill.engine.gate.set()
            await eventually(lambda: len(prefill.reader["r"].token_ids) >= 2)
        give_up(prefill)
        prefill.engine.gate.set()
        await prefill.assert_clean()
        assert not prefill.reader["r"].num_ends


async def test_a_drain_waits_for_the_last_token() -> None:
    async with prefill_running() as prefill:
        prefill.engine.gate.clear()
        prefill.start_whole(make_spec("r", max_tokens=5))
        await eventually(prefill.engine.is_in_step.is_set)
        drain = asyncio.create_task(prefill.worker.drain())
        await eventually(lambda: prefill.worker.is_draining)
        prefill.start_whole(make_spec("late"))
        await eventually(lambda: prefill.reader["late"].num_ends == 1)
        assert prefill.reader["late"].error_code == "draining"
        assert not drain.done()
        prefill.engine.gate.set()
        await drain
        assert prefill.reader["r"].token_ids == [11, 12, 13, 14, 15]
        await prefill.assert_clean()


async def test_what_does_not_fit_to_its_end_is_refused_although_its_prompt_fits() -> None:
    async with prefill_running(num_blocks=4) as prefill:
        prefill.start_whole(make_spec("r", 10, max_tokens=20))
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        assert prefill.reader["r"].error_code == "context_length_exceeded"
        await prefill.assert_clean()


async def test_a_step_that_fails_ends_it_and_others_can_follow() -> None:
    async with prefill_running() as prefill:
        prefill.engine.fails = lambda batch: prefill.engine.num_steps == 2
        prefill.start_whole(make_spec("r"))
        await eventually(lambda: prefill.reader["r"].num_ends == 1)
        assert prefill.reader["r"].error_code == "internal_error"
        assert prefill.reader["r"].token_ids == [11]
        prefill.start_whole(make_spec("next"))
        await eventually(lambda: prefill.reader["next"].num_ends == 1)
        assert prefill.reader["next"].token_ids == [11, 12, 13, 14]
        await prefill.assert_clean()
