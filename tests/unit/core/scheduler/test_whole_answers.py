"""A prefill worker that answers requests itself, beside those that it hands over."""

from __future__ import annotations

import pytest
from helpers.scheduling import NAMER, interactive, make_prefill, make_request, run_until_idle, shape, step

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, RequestState
from baton.services.core.scheduler.pace import STEP_SHARE, Pace


def test_it_gives_one_token_a_step_to_the_last() -> None:
    scheduler = make_prefill()
    request = make_request("r", 10, max_tokens=4)
    scheduler.add(request, is_whole=True)
    updates = run_until_idle(scheduler)
    assert [update.first_index for update in updates] == [0, 1, 2, 3]
    assert [update.finished for update in updates] == [False, False, False, True]
    assert not any(update.handing_over for update in updates)
    assert [update.prefill is not None for update in updates] == [True, False, False, False]
    assert (request.state, request.finish_reason) == (RequestState.FINISHED, FinishReason.LENGTH)
    assert not scheduler.release("r"), "no transfer holds any of its blocks"


def test_its_blocks_are_all_taken_when_it_is_admitted() -> None:
    scheduler = make_prefill(8)
    request = make_request("r", 6, max_tokens=11)  # the last of 17 tokens is never computed
    scheduler.add(request, is_whole=True)
    step(scheduler)
    assert len(request.block_table) == 4
    run_until_idle(scheduler)
    counts = scheduler.pool.counts()
    assert (counts.request, counts.cached, counts.free) == (0, 4, 4)


def test_its_full_blocks_those_of_the_answer_too_are_found_by_the_next_turn() -> None:
    scheduler = make_prefill()
    request = make_request("r", 6, max_tokens=11)
    scheduler.add(request, is_whole=True)
    run_until_idle(scheduler)
    names = NAMER.names(request.token_ids[:16], 4)
    assert len(scheduler.pool.lookup(names)) == 4
    following = make_request("s", 0)
    following.token_ids = [*request.token_ids, 5]
    following.num_prompt_tokens = len(following.token_ids)
    scheduler.add(following)
    step(scheduler)
    assert following.num_cached_tokens == 16


def test_one_waits_until_there_is_room_for_its_whole_length() -> None:
    scheduler = make_prefill(8)
    scheduler.add(make_request("a", 12, max_tokens=13), is_whole=True)
    step(scheduler)
    scheduler.add(make_request("b", 6, max_tokens=5, first_token=100), is_whole=True)
    scheduler.add(make_request("c", 4, first_token=200))
    _, updates = step(scheduler)
    assert set(updates) == {"a"}, "b needs three blocks of two, and c stands behind it"
    scheduler.abort("a")
    _, updates = step(scheduler)
    assert set(updates) == {"b", "c"}


def test_what_is_too_long_for_the_pool_is_refused_although_its_prompt_would_fit() -> None:
    scheduler = make_prefill(4)
    with pytest.raises(BatonError) as refused:
        scheduler.add(make_request("r", 8, max_tokens=10), is_whole=True)
    assert refused.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    scheduler.add(make_request("r", 8, max_tokens=10))


def test_its_length_is_bounded_by_the_models() -> None:
    scheduler = make_prefill(16, max_model_len=20)
    request = make_request("r", 8, max_tokens=100)
    scheduler.add(request, is_whole=True)
    step(scheduler)
    assert len(request.block_table) == 5
    run_until_idle(scheduler)
    assert (request.num_tokens, request.finish_reason) == (20, FinishReason.LENGTH)


def test_its_tokens_come_before_prompts_and_prompts_share_the_rest() -> None:
    scheduler = make_prefill(max_num_batched_tokens=10)
    scheduler.add(make_request("a", 5), is_whole=True)
    step(scheduler)
    scheduler.add(make_request("b", 30, first_token=100))
    output, _ = step(scheduler)
    assert shape(output) == {"a": 1, "b": 9}
    assert next(iter(shape(output))) == "a"


def test_its_target_bounds_the_prompts_that_are_computed_beside_it() -> None:
    pace = Pace(prefill_s_per_token=0.001, decode_step_s=0.003)
    scheduler = make_prefill(64, pace=pace, max_num_batched_tokens=128, max_model_len=256)
    scheduler.add(make_request("a", 5, service=interactive(tpot_s=0.02)), is_whole=True)
    step(scheduler)
    scheduler.add(make_request("b", 100, first_token=100))
    output, _ = step(scheduler)
    assert shape(output) == {"a": 1, "b": int((STEP_SHARE * 0.02 - 0.003) / 0.001)}


def test_prompts_that_are_handed_over_go_on_as_ever_beside_it() -> None:
    scheduler = make_prefill(max_num_batched_tokens=64)
    scheduler.add(make_request("a", 5, max_tokens=3), is_whole=True)
    handed_over = make_request("b", 9, first_token=100)
    scheduler.add(handed_over)
    _, updates = step(scheduler)
    assert updates["b"].handing_over
    assert updates["b"].completed_blocks == range(3), "the partial block goes over"
    assert scheduler.stats().answering == 1
    assert scheduler.stats().handing_over == 1
    run_until_idle(scheduler)
    assert handed_over.state is RequestState.HANDING_OVER
    scheduler.release("b")
    assert scheduler.pool.check_integrity() == 0
    assert scheduler.pool.counts().request == 0


def test_one_that_is_aborted_in_the_middle_leaves_nothing_but_cache() -> None:
    scheduler = make_prefill()
    request = make_request("r", 9, max_tokens=20)
    scheduler.add(request, is_whole=True)
    for _ in range(4):
        step(scheduler)
    assert scheduler.abort("r") is request
    counts = scheduler.pool.counts()
    assert (counts.request, counts.transfer, counts.cached) == (0, 0, 3)
    assert not scheduler.has_work


def test_what_an_answer_costs_a_tenant_counts_as_on_a_decode_worker() -> None:
    """Two tenants: one has a long answer in progress, so the other one's prompt is next although it came later."""
    scheduler = make_prefill(max_num_seqs=2, max_num_batched_tokens=64)
    greedy, modest = interactive(tenant="greedy"), interactive(tenant="modest")
    scheduler.add(make_request("g0", 8, max_tokens=40, service=greedy), is_whole=True)
    scheduler.add(make_request("m0", 30, max_tokens=40, first_token=100, service=modest), is_whole=True)
    for _ in range(16):
        step(scheduler)
    scheduler.abort("m0")
    for _ in range(14):
        step(scheduler)
    scheduler.add(make_request("g1", 8, first_token=200, service=greedy), is_whole=True)
    scheduler.add(make_request("m1", 8, first_token=300, service=modest), is_whole=True)
    output, _ = step(scheduler)
    assert set(shape(output)) == {"g0", "m1"}


def test_one_that_is_continued_begins_behind_the_tokens_so_far() -> None:
    scheduler = make_prefill()
    request = make_request("r", 9, max_tokens=6)
    request.token_ids += [1000, 1000]
    scheduler.add(request, is_whole=True)
    updates = run_until_idle(scheduler)
    assert [update.first_index for update in updates] == [2, 3, 4, 5]
    assert request.finish_reason is FinishReason.LENGTH


def test_a_deadline_ends_one_that_waits() -> None:
    scheduler = make_prefill(max_num_seqs=1)
    scheduler.add(make_request("a", 5, max_tokens=20), is_whole=True)
    step(scheduler)
    late = make_request("b", 5, deadline_s=1.0)
    scheduler.add(late, is_whole=True)
    output, updates = step(scheduler, 2.0)
    assert (output.expired, set(updates)) == ([late], {"a"})
    assert scheduler.stats().answering == 1


def test_answers_do_not_count_as_prompts_to_be_computed() -> None:
    scheduler = make_prefill()
    scheduler.add(make_request("r", 6, max_tokens=9), is_whole=True)
    assert scheduler.stats().queued_tokens == 6
    step(scheduler)
    stats = scheduler.stats()
    assert (stats.queued_tokens, stats.running, stats.answering) == (0, 1, 1)
