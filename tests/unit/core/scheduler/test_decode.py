"""The decode scheduler with prompts of its own: continuous batching, growth, preemption. It is the colocated worker."""

from __future__ import annotations

import pytest
from helpers.scheduling import make_decode, make_request, run_until_idle, shape, step

from baton.services.core.block_state import Hold, Owner
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, Request, RequestState, SampledToken, TokenLogprobs
from baton.services.core.scheduler.base import StepResult
from baton.services.core.scheduler.output_length import OutputLengthEstimator


def short_answers() -> OutputLengthEstimator:
    """Has seen only answers of one token, so that next to nothing is promised for growth."""
    return OutputLengthEstimator(prior_tokens=1)


def test_a_prompt_is_prefilled_then_decoded_one_token_a_step() -> None:
    scheduler = make_decode()
    request = make_request("r", 20, max_tokens=3)
    scheduler.add(request)
    shapes = []
    tokens = []
    while scheduler.has_work:
        output, updates = step(scheduler, token_of=lambda r: 1000 + r.num_output_tokens)
        shapes.append(shape(output)["r"])
        tokens += [(updates["r"].first_index, token.token_id) for token in updates["r"].new_tokens]
    assert shapes == [16, 4, 1, 1]
    assert tokens == [(0, 1000), (1, 1001), (2, 1002)]
    assert request.finish_reason is FinishReason.LENGTH


def test_only_the_first_token_reports_the_prefill() -> None:
    scheduler = make_decode()
    scheduler.add(make_request("r", 20, max_tokens=2, arrival_s=1.0))
    reports = [step(scheduler, now, end=now + 1.0)[1]["r"].prefill for now in (2.0, 3.0, 4.0)]
    assert reports[0] is reports[2] is None
    assert reports[1] is not None
    assert (reports[1].queue_s, reports[1].prefill_s) == (1.0, 2.0)


def test_decodes_go_first_and_a_long_prompt_fills_the_rest_of_the_budget() -> None:
    scheduler = make_decode(max_num_batched_tokens=10)
    scheduler.add(make_request("a", 4, max_tokens=20))
    scheduler.add(make_request("b", 4, max_tokens=20, first_token=100))
    step(scheduler)
    scheduler.add(make_request("long", 30, first_token=200))
    output = scheduler.schedule(0.0)
    assert [(i.request.request_id, i.num_tokens) for i in output.scheduled] == [("a", 1), ("b", 1), ("long", 8)]
    assert output.num_tokens == 10


def test_prefill_beside_decodes_can_be_bounded_and_is_not_where_nothing_decodes() -> None:
    scheduler = make_decode(max_num_batched_tokens=16, max_interleaved_prefill_tokens=4)
    scheduler.add(make_request("a", 16, max_tokens=20))
    assert shape(step(scheduler)[0]) == {"a": 16}
    scheduler.add(make_request("long", 30, first_token=200))
    assert shape(step(scheduler)[0]) == {"a": 1, "long": 4}


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_decode(max_num_seqs=2)
    for index in range(3):
        scheduler.add(make_request(f"r{index}", 4, first_token=100 * index, max_tokens=4))
    assert set(shape(step(scheduler)[0])) == {"r0", "r1"}
    run_until_idle(scheduler)
    assert scheduler.stats().running == 0


@pytest.mark.parametrize(
    ("sampling", "token", "reason", "stop_token_id"),
    [
        ({"eos_token_ids": frozenset({9})}, 9, FinishReason.STOP, None),
        ({"stop_token_ids": frozenset({9})}, 9, FinishReason.STOP, 9),
        ({"stop_token_ids": frozenset({9}), "eos_token_ids": frozenset({9})}, 9, FinishReason.STOP, None),
        ({"eos_token_ids": frozenset({9}), "ignore_eos": True}, 9, FinishReason.LENGTH, None),
        (
            {"stop_token_ids": frozenset({9}), "eos_token_ids": frozenset({9}), "ignore_eos": True},
            9,
            FinishReason.STOP,
            9,
        ),
        ({}, 9, FinishReason.LENGTH, None),
    ],
    ids=["eos", "stop token", "both", "ignored eos", "stop token that is an ignored eos", "neither"],
)
def test_how_generations_end(
    sampling: dict[str, object], token: int, reason: FinishReason, stop_token_id: int | None
) -> None:
    scheduler = make_decode()
    request = make_request("r", 4, max_tokens=3, **sampling)
    scheduler.add(request)
    while scheduler.has_work:
        step(scheduler, token_of=lambda _: token)
    assert (request.finish_reason, request.stop_token_id) == (reason, stop_token_id)
    assert request.num_output_tokens == (1 if reason is FinishReason.STOP else 3)


def test_no_ending_token_ends_a_generation_before_min_tokens() -> None:
    scheduler = make_decode()
    request = make_request("r", 4, max_tokens=6, min_tokens=3, eos_token_ids=frozenset({9}))
    scheduler.add(request)
    while scheduler.has_work:
        step(scheduler, token_of=lambda _: 9)
    assert (request.num_output_tokens, request.finish_reason) == (3, FinishReason.STOP)


def test_the_context_length_ends_a_generation() -> None:
    scheduler = make_decode(max_model_len=10)
    request = make_request("r", 7, max_tokens=50)
    scheduler.add(request)
    run_until_idle(scheduler)
    assert (request.num_tokens, request.finish_reason) == (10, FinishReason.LENGTH)


def test_generated_tokens_become_prefix_cache_like_any_other() -> None:
    scheduler = make_decode()
    first = make_request("turn-1", 6, max_tokens=8)
    scheduler.add(first)
    while scheduler.has_work:
        step(scheduler, token_of=lambda r: 2000 + r.num_tokens)
    second = make_request("turn-2", 1)
    second.token_ids = [*first.token_ids, 7, 7, 7]
    second.num_prompt_tokens = len(second.token_ids)
    scheduler.add(second)
    output, _ = step(scheduler)
    assert first.num_tokens == 14
    assert second.num_cached_tokens == 12, "three full blocks: six prompt tokens and six of the answer"
    assert shape(output) == {"turn-2": 5}


def test_the_newest_running_request_is_preempted_and_continues_later_with_the_same_tokens() -> None:
    scheduler = make_decode(6, output_lengths=short_answers())
    old = make_request("old", 8, max_tokens=12)
    new = make_request("new", 8, max_tokens=8, first_token=100)
    scheduler.add(old)
    scheduler.add(new)
    preempted: list[Request] = []
    tokens: dict[str, list[int]] = {"old": [], "new": []}
    for _ in range(200):
        if not scheduler.has_work:
            break
        output, updates = step(scheduler, token_of=lambda r: r.num_tokens * 10)
        preempted += output.preempted
        for request_id, update in updates.items():
            assert update.first_index == len(tokens[request_id])
            tokens[request_id] += [token.token_id for token in update.new_tokens]
        assert scheduler.pool.check_integrity() == 0
    assert set(preempted) == {new}
    assert (old.num_preemptions, new.num_preemptions) == (0, len(preempted))
    assert tokens == {
        "old": [10 * length for length in range(8, 20)],
        "new": [10 * length for length in range(8, 16)],
    }
    assert scheduler.stats().preemptions_total == len(preempted)


def test_a_preempted_request_finds_most_of_itself_in_the_cache() -> None:
    scheduler = make_decode(6, output_lengths=short_answers())
    scheduler.add(make_request("old", 8, max_tokens=12))
    new = make_request("new", 8, max_tokens=8, first_token=100)
    scheduler.add(new)
    while not new.num_preemptions:
        step(scheduler)
    assert (new.state, new.block_table, new.num_computed_tokens) == (RequestState.WAITING, [], 0)
    while new.state is RequestState.WAITING:
        output, _ = step(scheduler)
    assert shape(output)["new"] < new.num_tokens
    assert new.num_cached_tokens == 0, "the receipt tells what was cached when it came, not what it left itself"


def test_admission_keeps_room_for_the_growth_of_what_runs() -> None:
    lengths = OutputLengthEstimator(prior_tokens=16)
    scheduler = make_decode(8, output_lengths=lengths)
    scheduler.add(make_request("a", 4, max_tokens=16))  # may grow to 19 tokens of KV: 5 blocks
    scheduler.add(make_request("b", 4, max_tokens=16, first_token=100))
    shapes = [set(shape(step(scheduler)[0])) for _ in range(3)]
    assert shapes == [{"a"}] * 3, "b would fit now, but not when both have grown"
    run_until_idle(scheduler)
    assert scheduler.stats().preemptions_total == 0


def test_a_request_that_outgrew_its_promise_is_promised_more() -> None:
    scheduler = make_decode(9, output_lengths=short_answers())
    scheduler.add(make_request("a", 4, max_tokens=30))
    for _ in range(10):
        step(scheduler)
    # It holds 4 blocks, 5 are left; nothing is known of answers so long, so as much again is kept for it.
    scheduler.add(make_request("b", 16, max_tokens=2, first_token=100))
    step(scheduler)
    assert scheduler.stats().queued == 1


def test_alone_a_request_starts_even_if_there_is_no_room_now_for_all_of_its_growth() -> None:
    scheduler = make_decode(8, output_lengths=OutputLengthEstimator(prior_tokens=1000))
    lost = Hold(Owner.TRANSFER, "elsewhere/1")
    blocks = scheduler.pool.allocate(3, lost)
    scheduler.pool.quarantine(blocks, lost)
    request = make_request("r", 8, max_tokens=24)
    scheduler.add(request)
    for _ in range(30):
        step(scheduler)
    assert (request.num_output_tokens, request.num_preemptions) == (13, 0), "it waits with what it has"
    scheduler.pool.release_quarantine(blocks)
    run_until_idle(scheduler)
    assert request.num_output_tokens == 24


def test_a_preempted_request_comes_back_before_those_that_never_ran() -> None:
    scheduler = make_decode(6, output_lengths=short_answers())
    scheduler.add(make_request("old", 8, max_tokens=12))
    preempted = make_request("preempted", 8, max_tokens=8, first_token=100)
    scheduler.add(preempted)
    step(scheduler)
    scheduler.add(make_request("later", 16, max_tokens=2, first_token=200))
    ends = [update.request.request_id for update in run_until_idle(scheduler) if update.finished]
    assert preempted.num_preemptions > 0
    assert ends == ["old", "preempted", "later"]


def test_what_could_never_run_to_its_end_is_refused_with_figures() -> None:
    scheduler = make_decode(4)
    with pytest.raises(
        BatonError, match="may grow to 17 tokens of KV cache; this worker's whole cache holds 16"
    ) as caught:
        scheduler.add(make_request("r", 10, max_tokens=8))
    assert (caught.value.code, caught.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "max_tokens")
    scheduler.add(make_request("r", 10, max_tokens=7))


def test_the_queue_is_served_in_order_even_where_a_later_one_would_fit() -> None:
    scheduler = make_decode(8, output_lengths=short_answers())
    scheduler.add(make_request("a", 16, max_tokens=10))
    step(scheduler)
    scheduler.add(make_request("large", 24, max_tokens=2, first_token=100))
    scheduler.add(make_request("small", 4, max_tokens=2, first_token=200))
    for _ in range(3):
        assert set(shape(step(scheduler)[0])) == {"a"}


def test_waiting_requests_end_at_their_deadline_and_running_ones_do_not() -> None:
    scheduler = make_decode(max_num_seqs=1)
    running, late = make_request("a", 4, deadline_s=5.0), make_request("b", 4, deadline_s=5.0)
    scheduler.add(running)
    step(scheduler, 1.0)
    scheduler.add(late)
    output, _ = step(scheduler, 6.0)
    assert output.expired == [late]
    assert running.state is RequestState.RUNNING


def test_abort_in_every_state_of_a_local_prompt_frees_everything() -> None:
    scheduler = make_decode(max_num_batched_tokens=8)
    for name in ("decoding", "prefilling", "waiting"):
        scheduler.add(make_request(name, 30 if name == "prefilling" else 4, first_token=len(name) * 100))
        if name != "waiting":
            step(scheduler)
    for name in ("decoding", "prefilling", "waiting"):
        request = scheduler.abort(name)
        assert request is not None
        assert request.finish_reason is FinishReason.ABORT
    assert not scheduler.has_work
    counts = scheduler.pool.counts()
    assert (counts.request, counts.error) == (0, 0)


def test_prompt_logprobs_start_over_with_a_preempted_prompt() -> None:
    scheduler = make_decode(8, output_lengths=short_answers(), max_num_batched_tokens=4)
    scheduler.add(make_request("old", 12, max_tokens=14))
    for _ in range(3):
        step(scheduler)
    wanted = make_request("new", 16, max_tokens=2, first_token=100, num_prompt_logprobs=0)
    scheduler.add(wanted)
    entries = [None, *(TokenLogprobs(-float(index)) for index in range(1, 16))]
    reports = []
    preempted_at = None
    for _ in range(100):
        start = wanted.num_computed_tokens
        output = scheduler.schedule(0.0)
        if wanted in output.preempted:
            preempted_at = start
        start, num_tokens = wanted.num_computed_tokens, shape(output).get("new", 0)
        chunk = entries[start + 1 if start else 0 : start + num_tokens + 1] if num_tokens else []
        sampled = {i.request.request_id: SampledToken(1) for i in output.scheduled if i.samples}
        updates = scheduler.update(output, StepResult(sampled, {"new": chunk}), 0.0)
        reports += [u.prompt_logprobs for u in updates if u.prompt_logprobs is not None]
        if not scheduler.has_work:
            break
    assert preempted_at == 12, "in the middle of its prompt"
    assert wanted.num_cached_tokens == 0
    assert reports == [tuple(entries)]


def test_requests_that_resume_continue_their_numbering() -> None:
    scheduler = make_decode()
    request = make_request("r", 6, max_tokens=5)
    request.token_ids += [1, 2, 3]
    scheduler.add(request)
    _, updates = step(scheduler)
    assert updates["r"].first_index == 3
    _, updates = step(scheduler)
    assert updates["r"].finished


def test_answers_teach_the_estimator() -> None:
    scheduler = make_decode(output_lengths=OutputLengthEstimator(prior_tokens=512, prior_weight=0.1))
    for index in range(4):
        scheduler.add(make_request(f"r{index}", 4, max_tokens=4, first_token=100 * index))
    run_until_idle(scheduler)
    assert scheduler.output_lengths.expected(1000) == 4
