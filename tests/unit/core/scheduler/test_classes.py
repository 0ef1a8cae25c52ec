"""Batch takes what is left over and gives way within a step; prompts leave the streams beside them their time."""

from __future__ import annotations

import pytest
from helpers.scheduling import (
    batch,
    interactive,
    make_decode,
    make_prefill,
    make_request,
    run_until_idle,
    shape,
    standard,
    step,
)

from baton.services.core.request import RequestState
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.scheduler.pace import Pace
from baton.services.core.scheduler.waiting import Patience


def short_answers() -> OutputLengthEstimator:
    return OutputLengthEstimator(prior_tokens=1)


def test_a_batch_prompt_in_progress_gives_its_tokens_up_in_the_next_step() -> None:
    scheduler = make_prefill(max_num_batched_tokens=10)
    scheduler.add(make_request("batch", 40, service=batch()))
    assert shape(step(scheduler)[0]) == {"batch": 10}
    scheduler.add(make_request("urgent", 18, first_token=500, service=interactive(1.0)))
    assert shape(step(scheduler)[0]) == {"urgent": 10}
    assert shape(step(scheduler)[0]) == {"urgent": 8, "batch": 2}
    assert shape(step(scheduler)[0]) == {"batch": 10}


def test_a_prompt_in_progress_with_more_slack_waits_for_the_more_urgent() -> None:
    scheduler = make_prefill(max_num_batched_tokens=10, short_prompt_share=0.0)
    scheduler.add(make_request("patient", 25, service=standard(5.0)))
    step(scheduler)
    scheduler.add(make_request("urgent", 12, first_token=500, service=interactive(1.0)))
    assert shape(step(scheduler)[0]) == {"urgent": 10}
    assert shape(step(scheduler)[0]) == {"urgent": 2, "patient": 8}


def test_batch_prompts_leave_seats_and_blocks_for_those_in_a_hurry() -> None:
    scheduler = make_prefill(16, max_num_batched_tokens=64, max_num_seqs=4)
    for number in range(4):
        scheduler.add(make_request(f"batch-{number}", 16, first_token=1000 * number, service=batch()))
    assert set(shape(step(scheduler)[0])) == {"batch-0", "batch-1"}, "their blocks are half of the pool"
    scheduler.add(make_request("urgent", 30, first_token=9000, service=interactive(1.0)))
    assert set(shape(step(scheduler)[0])) == {"urgent"}
    for request_id in ("batch-0", "batch-1", "urgent"):
        scheduler.release(request_id)
    assert set(shape(step(scheduler)[0])) == {"batch-2", "batch-3"}


def test_a_batch_prompt_that_needs_most_of_the_pool_runs_alone() -> None:
    scheduler = make_prefill(8, max_num_batched_tokens=64)
    scheduler.add(make_request("large", 30, service=batch()))
    assert shape(step(scheduler)[0]) == {"large": 30}


def test_batch_gives_its_seats_to_whoever_waits_for_one() -> None:
    scheduler = make_decode(max_num_seqs=2)
    for number in range(2):
        scheduler.add(make_request(f"batch-{number}", 4, max_tokens=20, first_token=100 * number, service=batch()))
    step(scheduler)
    scheduler.add(make_request("urgent", 4, max_tokens=3, first_token=500, service=interactive(1.0)))
    output, _ = step(scheduler)
    assert shape(output) == {"batch-0": 1, "urgent": 4}
    assert [request.request_id for request in output.preempted] == ["batch-1"]
    ends = [update.request.request_id for update in run_until_idle(scheduler) if update.finished]
    assert ends == ["urgent", "batch-0", "batch-1"]


def test_batch_gives_its_blocks_to_a_reservation_that_waits_for_some() -> None:
    scheduler = make_decode(8, output_lengths=short_answers())
    scheduler.add(make_request("batch", 24, max_tokens=4, service=batch()))
    step(scheduler)
    names = make_prefill()
    request = make_request("urgent", 16, max_tokens=4, first_token=500, service=interactive(1.0))
    twin = make_request("urgent", 16, max_tokens=4, first_token=500)
    names.add(twin)
    assert scheduler.reserve(request, names.block_names("urgent"), 0.0) is None
    output = scheduler.schedule(0.0)
    assert [reservation.request for reservation in output.granted] == [request]
    assert [preempted.request_id for preempted in output.preempted] == ["batch"]
    assert scheduler.pool.check_integrity() == 0


def test_batch_does_not_give_way_to_batch_nor_for_nothing() -> None:
    scheduler = make_decode(max_num_seqs=1)
    scheduler.add(make_request("running", 4, max_tokens=6, service=batch()))
    step(scheduler)
    scheduler.add(make_request("waiting", 4, max_tokens=6, first_token=100, service=batch()))
    assert shape(step(scheduler)[0]) == {"running": 1}
    run_until_idle(scheduler)
    assert scheduler.stats().preemptions_total == 0


def test_batch_whose_patience_is_over_is_not_driven_out_again() -> None:
    scheduler = make_decode(max_num_seqs=1, patience=Patience(batch_s=10.0))
    request = make_request("batch", 4, max_tokens=30, service=batch())
    scheduler.add(request)
    step(scheduler, 1.0)
    scheduler.add(make_request("urgent-0", 4, max_tokens=2, first_token=100, arrival_s=2.0, service=interactive(3.0)))
    assert set(shape(step(scheduler, 2.0)[0])) == {"urgent-0"}
    step(scheduler, 11.0)
    assert request.state is RequestState.WAITING
    for number in range(1, 8):
        level = interactive(12.0 + number)
        scheduler.add(make_request(f"urgent-{number}", 4, max_tokens=2, first_token=100 * number, service=level))
        step(scheduler, 11.0 + number)
    assert request.state is RequestState.RUNNING
    assert request.num_preemptions == 1


def test_without_room_for_growth_the_one_with_the_most_slack_gives_way() -> None:
    scheduler = make_decode(6, output_lengths=short_answers())
    scheduler.add(make_request("patient", 8, max_tokens=12, service=standard(5.0)))
    scheduler.add(make_request("urgent", 8, max_tokens=12, first_token=100, service=interactive(1.0)))
    preempted = []
    while scheduler.has_work:
        preempted += step(scheduler)[0].preempted
    assert {request.request_id for request in preempted} == {"patient"}, "though it was there first"


@pytest.mark.parametrize(
    ("tpot_s", "num_prompt_tokens"),
    [(None, 15), (0.1, 5), (0.05, 4), (0.001, 4), (10.0, 15)],
    ids=["no target", "what fits", "a block at least", "a block also where it is hopeless", "all"],
)
def test_a_prompt_beside_streams_leaves_them_their_time(tpot_s: float | None, num_prompt_tokens: int) -> None:
    pace = Pace(prefill_s_per_token=0.01, decode_step_s=0.01)
    scheduler = make_decode(max_num_batched_tokens=16, pace=pace)
    scheduler.add(make_request("stream", 8, max_tokens=20, service=standard(tpot_s=tpot_s)))
    assert shape(step(scheduler)[0]) == {"stream": 8}
    scheduler.add(make_request("prompt", 40, first_token=100))
    assert shape(step(scheduler)[0]) == {"stream": 1, "prompt": num_prompt_tokens}


def test_the_pace_of_a_worker_is_learned_from_its_steps() -> None:
    pace = Pace()
    scheduler = make_decode(max_num_batched_tokens=16, pace=pace)
    scheduler.add(make_request("a", 16, max_tokens=20))
    step(scheduler, 0.0, end=1.6)
    assert (pace.prefill_s_per_token, pace.decode_step_s) == (pytest.approx(0.1), 0.0)
    step(scheduler, 2.0, end=2.5)
    assert pace.decode_step_s == pytest.approx(0.5)
    scheduler.add(make_request("b", 15, first_token=100))
    step(scheduler, 3.0, end=5.0)
    assert pace.prefill_s_per_token == pytest.approx(0.1), "the decodes beside a prompt have their own time"


def test_stats_tell_which_tokens_nobody_waits_for() -> None:
    for scheduler in (make_prefill(max_num_seqs=1), make_decode(max_num_seqs=1)):
        scheduler.add(make_request("a", 8, service=batch()))
        scheduler.add(make_request("b", 12, first_token=100))
        stats = scheduler.stats()
        assert (stats.queued_tokens, stats.batch_queued_tokens) == (20, 8)
