"""The prefill scheduler."""

from __future__ import annotations

import pytest
from helpers.scheduling import make_prefill, make_request, run_until_idle, shape, step

from baton.services.core.block_state import BlockCounts
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, RequestState, SampledToken, TokenLogprobs
from baton.services.core.scheduler.base import StepResult


def test_a_long_prompt_is_computed_in_chunks_and_reports_its_blocks_as_they_fill() -> None:
    scheduler = make_prefill(max_num_batched_tokens=10)
    scheduler.add(make_request("r", 23))
    reports = []
    for _ in range(3):
        output, updates = step(scheduler)
        reports.append((shape(output)["r"], updates["r"].completed_blocks, updates["r"].handing_over))
    assert reports == [(10, range(2), False), (10, range(2, 5), False), (3, range(5, 6), True)]


def test_the_reported_ids_are_those_of_the_block_table() -> None:
    scheduler = make_prefill()
    request = make_request("r", 14)
    scheduler.add(request)
    _, updates = step(scheduler)
    assert updates["r"].completed_block_ids == tuple(request.block_table)
    assert len(request.block_table) == 4


def test_the_first_token_comes_with_how_the_prompt_was_computed() -> None:
    scheduler = make_prefill(max_num_batched_tokens=8)
    request = make_request("r", 12, arrival_s=1.0)
    scheduler.add(request)
    step(scheduler, 3.0, end=4.0)
    _, updates = step(scheduler, 4.0, end=5.5)
    info = updates["r"].prefill
    assert info is not None
    assert (info.num_cached_tokens, info.queue_s, info.prefill_s) == (0, 2.0, 2.5)
    assert (updates["r"].first_index, updates["r"].new_tokens) == (0, (SampledToken(1000),))
    assert request.token_ids[12:] == [1000]


def test_a_finished_prompt_is_pinned_until_released_and_then_evictable_cache() -> None:
    scheduler = make_prefill(8)
    request = make_request("r", 14)
    scheduler.add(request)
    names = scheduler.block_names("r")
    step(scheduler)
    assert request.state is RequestState.HANDING_OVER
    assert not scheduler.has_work
    assert scheduler.stats().handing_over == 1
    assert scheduler.pool.counts().request == 4
    blocks = list(request.block_table)
    assert scheduler.release("r")
    assert (request.state, request.finish_reason) == (RequestState.FINISHED, None)
    assert scheduler.pool.counts() == BlockCounts(total=8, free=4, cached=4, request=0, transfer=0, quarantine=0)
    assert scheduler.pool.lookup(names) == blocks, "the partial last block is found by its name too"
    assert not scheduler.release("r"), "a second time there is nothing to release"


def test_an_aborted_prompt_leaves_reported_blocks_to_the_transfer_until_released() -> None:
    scheduler = make_prefill(8, max_num_batched_tokens=8)
    request = make_request("r", 20)
    scheduler.add(request)
    step(scheduler)
    assert scheduler.abort("r") is request
    assert (request.state, request.finish_reason) == (RequestState.FINISHED, FinishReason.ABORT)
    assert scheduler.pool.counts() == BlockCounts(total=8, free=6, cached=0, request=0, transfer=2, quarantine=0)
    assert scheduler.release("r")
    assert scheduler.pool.counts() == BlockCounts(total=8, free=6, cached=2, request=0, transfer=0, quarantine=0)
    assert scheduler.abort("r") is None


def test_an_abort_while_handing_over_waits_for_the_transfer_too() -> None:
    scheduler = make_prefill(8)
    scheduler.add(make_request("r", 8))
    step(scheduler)
    scheduler.abort("r")
    assert scheduler.pool.counts().transfer == 2
    scheduler.release("r", attempt=1)
    assert scheduler.pool.counts().cached == 2


def test_a_waiting_prompt_that_is_aborted_held_nothing() -> None:
    scheduler = make_prefill(max_num_seqs=1)
    for request_id in ("a", "b"):
        scheduler.add(make_request(request_id, 30))
    step(scheduler)
    scheduler.abort("b")
    assert scheduler.stats().queued == 0
    assert not scheduler.release("b")


def test_a_new_attempt_may_begin_while_the_old_ones_blocks_are_still_being_read() -> None:
    scheduler = make_prefill(max_num_batched_tokens=16)
    scheduler.add(make_request("r", 20))
    step(scheduler)
    scheduler.abort("r")
    second = make_request("r", 20, attempt=2)
    scheduler.add(second)
    step(scheduler)
    assert second.num_cached_tokens == 16
    assert scheduler.release("r", attempt=1)
    assert second.state is RequestState.HANDING_OVER, "the old attempt's release is not the new one's"
    assert scheduler.pool.counts().request == 5
    scheduler.release("r", attempt=2)
    assert second.state is RequestState.FINISHED
    assert scheduler.pool.check_integrity() == 0


def test_a_request_that_ends_at_its_first_token_ends_here_and_reports_no_block() -> None:
    scheduler = make_prefill(8, max_num_batched_tokens=8)
    request = make_request("r", 12, eos_token_ids=frozenset({1000}))
    assert scheduler.is_handed_over(request)
    scheduler.add(request)
    step(scheduler)
    _, updates = step(scheduler)
    assert (updates["r"].finished, updates["r"].handing_over) == (True, False)
    assert updates["r"].completed_blocks == range(0)
    assert request.finish_reason is FinishReason.STOP
    assert scheduler.pool.counts().transfer == 2, "what the first chunk reported waits for the handoff's abort"
    scheduler.release("r")
    assert scheduler.pool.counts().transfer == 0


@pytest.mark.parametrize("limits", [{"max_tokens": 1}, {"max_tokens": 60, "num_prompt_tokens": 63}])
def test_where_the_first_token_must_be_the_last_nothing_is_given_to_a_transfer(limits: dict[str, int]) -> None:
    scheduler = make_prefill(max_num_batched_tokens=8)
    request = make_request("r", limits.get("num_prompt_tokens", 12), max_tokens=limits["max_tokens"])
    assert not scheduler.is_handed_over(request)
    scheduler.add(request)
    updates = run_until_idle(scheduler)
    assert all(update.completed_blocks == range(0) for update in updates)
    assert request.finish_reason is FinishReason.LENGTH
    assert not scheduler.release("r")
    counts = scheduler.pool.counts()
    assert (counts.request, counts.transfer) == (0, 0)


def test_a_cached_prefix_is_reused_and_reported_with_the_first_chunk() -> None:
    scheduler = make_prefill()
    scheduler.add(make_request("a", 14))
    step(scheduler)
    scheduler.release("a")
    request = make_request("b", 18)
    scheduler.add(request)
    output, updates = step(scheduler)
    assert shape(output) == {"b": 6}
    assert request.num_cached_tokens == 12
    assert updates["b"].completed_blocks == range(5)


def test_a_fully_known_prompt_computes_its_last_block_again() -> None:
    scheduler = make_prefill()
    scheduler.add(make_request("a", 16))
    step(scheduler)
    scheduler.release("a")
    scheduler.add(make_request("b", 16))
    output, _ = step(scheduler)
    assert shape(output) == {"b": 4}


def test_prompts_of_different_salts_share_nothing() -> None:
    scheduler = make_prefill()
    scheduler.add(make_request("a", 16, cache_salt="alice"))
    step(scheduler)
    scheduler.release("a")
    bob = make_request("b", 16, cache_salt="bob")
    scheduler.add(bob)
    step(scheduler)
    assert bob.num_cached_tokens == 0


def test_without_prefix_caching_nothing_is_found_or_named() -> None:
    scheduler = make_prefill(prefix_caching=False)
    for request_id in ("a", "b"):
        request = make_request(request_id, 14)
        scheduler.add(request)
        _, updates = step(scheduler)
        assert updates[request_id].completed_blocks == range(4)
        assert len(scheduler.block_names(request_id)) == 4
        scheduler.release(request_id)
        assert request.num_cached_tokens == 0
    assert scheduler.pool.names() == ()


def test_prompt_logprobs_skip_the_cache_and_come_whole_with_the_first_token() -> None:
    scheduler = make_prefill(max_num_batched_tokens=8)
    scheduler.add(make_request("a", 12))
    run_until_idle(scheduler)
    scheduler.release("a")
    request = make_request("b", 12, num_prompt_logprobs=0)
    scheduler.add(request)
    entries = [None, *(TokenLogprobs(-float(token)) for token in range(1, 12))]
    for start, end in ((0, 9), (9, 12)):
        output = scheduler.schedule(0.0)
        sampled = {"b": SampledToken(5)} if end == 12 else {}
        [update] = scheduler.update(output, StepResult(sampled, {"b": entries[start:end]}), 0.0)
    assert request.num_cached_tokens == 0
    assert update.prompt_logprobs == tuple(entries)


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one_before_it() -> None:
    scheduler = make_prefill(max_num_batched_tokens=16, short_prompt_share=0.25)
    scheduler.add(make_request("long", 60))
    scheduler.add(make_request("short", 4, first_token=500))
    output, updates = step(scheduler)
    assert shape(output) == {"long": 12, "short": 4}
    assert updates["short"].handing_over


def test_prompts_behind_a_long_one_that_are_not_short_wait_their_turn() -> None:
    scheduler = make_prefill(max_num_batched_tokens=16)
    scheduler.add(make_request("first", 20))
    scheduler.add(make_request("second", 20, first_token=500))
    assert shape(step(scheduler)[0]) == {"first": 16}
    assert shape(step(scheduler)[0]) == {"first": 4, "second": 12}


def test_running_prompts_go_on_before_new_ones_begin() -> None:
    scheduler = make_prefill(max_num_batched_tokens=16, max_num_seqs=2)
    for index in range(4):
        scheduler.add(make_request(f"r{index}", 12, first_token=100 * index))
    assert shape(step(scheduler)[0]) == {"r0": 12, "r1": 4}
    assert shape(step(scheduler)[0]) == {"r1": 8, "r2": 8}, "a seat is free as soon as a prompt is complete"
    assert shape(step(scheduler)[0]) == {"r2": 4, "r3": 12}


def test_prompts_wait_in_order_while_handed_over_blocks_fill_the_pool() -> None:
    scheduler = make_prefill(8)
    scheduler.add(make_request("a", 16))
    step(scheduler)
    scheduler.add(make_request("large", 28, first_token=500))
    scheduler.add(make_request("small", 4, first_token=700))
    output, _ = step(scheduler)
    assert shape(output) == {}, "the small one would fit, but must not starve the large one"
    assert scheduler.has_work
    scheduler.release("a")
    output, _ = step(scheduler)
    assert shape(output) == {"large": 12, "small": 4}, "short prompts have their share of the tokens, not of the order"


def test_waiting_prompts_end_at_their_deadline() -> None:
    scheduler = make_prefill(max_num_seqs=1)
    scheduler.add(make_request("a", 40))
    late = make_request("b", 4, deadline_s=2.0)
    scheduler.add(late)
    assert step(scheduler, 1.9)[0].expired == []
    assert step(scheduler, 2.0)[0].expired == [late]
    assert (late.state, late.finish_reason) == (RequestState.FINISHED, FinishReason.ERROR)
    assert scheduler.stats().queued == 0


def test_blocks_are_overdue_when_the_receiver_is_silent_for_a_lease() -> None:
    scheduler = make_prefill(transfer_lease_s=10.0)
    scheduler.add(make_request("r", 8))
    step(scheduler, 0.0, end=1.0)
    assert scheduler.pool.overdue(11.0) == 0
    assert scheduler.pool.overdue(11.5) == 2
    scheduler.renew_lease("r", 1, 11.0)
    assert scheduler.pool.overdue(11.5) == 0
    scheduler.release("r")
    scheduler.renew_lease("r", 1, 12.0)
    assert scheduler.pool.overdue(99.0) == 0


def test_a_retry_brings_the_tokens_that_were_generated_before() -> None:
    scheduler = make_prefill()
    request = make_request("r", 10)
    request.token_ids += [1, 2]
    scheduler.add(request)
    output, updates = step(scheduler)
    assert shape(output) == {"r": 12}
    assert updates["r"].first_index == 2


def test_what_can_never_be_served_is_refused_with_figures() -> None:
    scheduler = make_prefill(4, max_model_len=1000)
    with pytest.raises(
        BatonError, match=r"17 tokens of KV cache; this worker's whole cache holds 16 \(4 blocks of 4\)"
    ):
        scheduler.add(make_request("r", 17))
    scheduler = make_prefill(max_model_len=20)
    with pytest.raises(BatonError, match="maximum context length is 20 tokens; the prompt has 20") as caught:
        scheduler.add(make_request("r", 20))
    assert (caught.value.code, caught.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "prompt")
    assert scheduler.stats().queued == 0


def test_a_request_is_not_accepted_twice() -> None:
    scheduler = make_prefill()
    scheduler.add(make_request("r", 4))
    with pytest.raises(BatonError, match="already on this worker"):
        scheduler.add(make_request("r", 4))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda request: request.token_ids.clear(),
        lambda request: setattr(request, "num_prompt_tokens", 9),
        lambda request: request.token_ids.extend([1] * 8),
    ],
    ids=["no tokens", "prompt longer than the tokens", "nothing left to generate"],
)
def test_a_request_that_contradicts_itself_is_refused(spoil) -> None:  # type: ignore[no-untyped-def]
    request = make_request("r", 8, max_tokens=8)
    spoil(request)
    with pytest.raises(BatonError) as caught:
        make_prefill().add(request)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_stats_count_what_waits_and_what_runs() -> None:
    scheduler = make_prefill(max_num_seqs=1)
    scheduler.add(make_request("a", 20))
    scheduler.add(make_request("b", 8))
    step(scheduler)
    stats = scheduler.stats()
    assert (stats.queued, stats.running, stats.queued_tokens, stats.handing_over) == (1, 1, 12, 0)


def test_a_request_aborted_during_its_step_is_not_updated() -> None:
    scheduler = make_prefill()
    scheduler.add(make_request("r", 8))
    output = scheduler.schedule(0.0)
    scheduler.abort("r")
    scheduler.add(make_request("r", 8, attempt=2))
    assert scheduler.update(output, StepResult({"r": SampledToken(1)}), 0.0) == []
