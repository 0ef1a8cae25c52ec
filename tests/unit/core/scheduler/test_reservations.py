"""The decode scheduler as the receiver of handoffs: reserve, grant, commit, abort."""

from __future__ import annotations

import pytest
from helpers.scheduling import BLOCK_SIZE, NAMER, make_decode, make_request, run_until_idle, shape, step

from baton.services.core.block_state import BlockCounts
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, Request, RequestState, SampledToken
from baton.services.core.scheduler.base import Reservation
from baton.services.core.scheduler.decode import DecodeScheduler
from baton.services.core.scheduler.output_length import OutputLengthEstimator

TOKEN = SampledToken(1000)


def names_of(request: Request) -> list[bytes]:
    return NAMER.names(request.token_ids, BLOCK_SIZE, request.cache_salt)


def reserve(scheduler: DecodeScheduler, request: Request, now: float = 0.0) -> Reservation | None:
    return scheduler.reserve(request, names_of(request), now)


def granted(scheduler: DecodeScheduler, request: Request, now: float = 0.0) -> Reservation:
    reservation = reserve(scheduler, request, now)
    assert reservation is not None
    return reservation


def test_a_grant_names_a_slot_and_its_generation_for_every_block_that_is_missing() -> None:
    scheduler = make_decode()
    request = make_request("r", 10)
    reservation = granted(scheduler, request, 3.0)
    assert [slot.index for slot in reservation.slots] == [0, 1, 2]
    assert [slot.generation for slot in reservation.slots] == [
        scheduler.pool.generation(slot.block_id) for slot in reservation.slots
    ]
    assert (reservation.num_held_blocks, reservation.num_cached_tokens) == (0, 0)
    assert (reservation.requested_s, reservation.granted_s) == (3.0, 3.0)
    assert request.state is RequestState.AWAITING_KV
    assert scheduler.pool.counts().transfer == 3
    assert scheduler.stats().awaiting_kv == 1
    assert shape(scheduler.schedule(4.0)) == {}, "nothing runs before the blocks are there"


def test_a_committed_request_decodes_at_the_token_behind_its_first() -> None:
    scheduler = make_decode()
    request = make_request("r", 10, max_tokens=3)
    granted(scheduler, request)
    assert scheduler.commit("r", TOKEN, 1.0) is request
    assert (request.num_computed_tokens, request.token_ids[10:]) == (10, [1000])
    assert scheduler.pool.counts().request == 3
    output, updates = step(scheduler, 2.0)
    assert shape(output) == {"r": 1}
    assert updates["r"].first_index == 1
    assert updates["r"].prefill is None, "the prompt was computed elsewhere"
    run_until_idle(scheduler)
    assert request.num_output_tokens == 3
    counts = scheduler.pool.counts()
    assert (counts.request, counts.transfer) == (0, 0)


def test_committed_blocks_are_cache_for_the_next_request_and_need_not_be_sent() -> None:
    scheduler = make_decode()
    granted(scheduler, make_request("a", 10))
    assert scheduler.pool.names() == (), "blocks cannot be found before they were verified"
    scheduler.commit("a", TOKEN, 1.0)
    reservation = granted(scheduler, make_request("b", 14))
    assert (reservation.num_held_blocks, reservation.num_cached_tokens) == (2, 8)
    assert [slot.index for slot in reservation.slots] == [2, 3]


def test_a_fully_known_prompt_needs_nothing_but_a_commit() -> None:
    scheduler = make_decode()
    granted(scheduler, make_request("a", 8))
    scheduler.commit("a", TOKEN, 1.0)
    second = make_request("b", 8)
    reservation = granted(scheduler, second)
    assert (reservation.slots, reservation.num_held_blocks, reservation.num_cached_tokens) == ((), 2, 7)
    scheduler.commit("b", TOKEN, 2.0)
    assert shape(step(scheduler)[0]) == {"a": 1, "b": 1}


def test_a_partial_block_is_never_shared_since_both_would_write_into_it() -> None:
    scheduler = make_decode()
    first, second = make_request("a", 10), make_request("b", 10)
    granted(scheduler, first)
    scheduler.commit("a", TOKEN, 1.0)
    reservation = granted(scheduler, second)
    assert [slot.index for slot in reservation.slots] == [2]
    scheduler.commit("b", TOKEN, 1.0)
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]


def test_without_room_a_reservation_waits_and_comes_out_of_a_later_step() -> None:
    scheduler = make_decode(8, output_lengths=OutputLengthEstimator(prior_tokens=1))
    granted(scheduler, make_request("a", 20, max_tokens=4))
    waiting = make_request("b", 16, first_token=100)
    assert reserve(scheduler, waiting, 1.0) is None
    assert waiting.state is RequestState.WAITING
    assert scheduler.stats().queued == 1
    scheduler.commit("a", TOKEN, 2.0)
    for now in range(3, 20):
        output, _ = step(scheduler, float(now))
        if output.granted:
            break
    [reservation] = output.granted
    assert reservation.request is waiting
    assert (reservation.requested_s, reservation.granted_s) == (1.0, float(now))
    assert len(reservation.slots) == 4


def test_a_grant_keeps_room_for_the_growth_of_what_runs_and_of_itself() -> None:
    scheduler = make_decode(8, output_lengths=OutputLengthEstimator(prior_tokens=16))
    granted(scheduler, make_request("a", 4, max_tokens=16))
    assert reserve(scheduler, make_request("b", 4, max_tokens=16, first_token=100)) is None
    assert scheduler.pool.num_available == 7, "there are blocks, but not for both to grow"


def test_reservations_are_granted_in_order() -> None:
    scheduler = make_decode(8, output_lengths=OutputLengthEstimator(prior_tokens=1))
    granted(scheduler, make_request("a", 20))
    assert reserve(scheduler, make_request("large", 20, first_token=100)) is None
    assert reserve(scheduler, make_request("small", 4, first_token=200)) is None
    scheduler.abort_reservation("a", writes_quiet=True, now=1.0)
    assert [r.request.request_id for r in scheduler.schedule(2.0).granted] == ["large", "small"]


def test_a_reservation_takes_a_seat_in_the_batch() -> None:
    scheduler = make_decode(max_num_seqs=1)
    granted(scheduler, make_request("a", 4))
    assert reserve(scheduler, make_request("b", 4, first_token=100)) is None


def test_a_prompt_that_waits_for_tokens_does_not_hold_a_reservation_up_but_keeps_its_room() -> None:
    scheduler = make_decode(12, max_num_batched_tokens=4, output_lengths=OutputLengthEstimator(prior_tokens=1))
    scheduler.add(make_request("running", 16, max_tokens=2))
    step(scheduler)
    scheduler.add(make_request("next", 12, max_tokens=2, first_token=100))
    assert reserve(scheduler, make_request("large", 24, max_tokens=2, first_token=200)) is None
    scheduler.abort("large")
    assert reserve(scheduler, make_request("small", 16, max_tokens=2, first_token=300)) is not None


def test_an_aborted_transfer_frees_its_blocks_where_no_write_can_land() -> None:
    scheduler = make_decode(8)
    request = make_request("r", 10)
    granted(scheduler, request)
    assert scheduler.abort_reservation("r", writes_quiet=True, now=1.0) is request
    assert (request.state, request.finish_reason) == (RequestState.FINISHED, FinishReason.ABORT)
    assert scheduler.pool.counts().free == 8
    assert scheduler.abort_reservation("r", writes_quiet=True, now=1.0) is None


def test_an_aborted_transfer_leaves_its_blocks_in_quarantine_where_a_write_could_land() -> None:
    scheduler = make_decode(8, transfer_lease_s=10.0)
    granted(scheduler, make_request("r", 10))
    scheduler.abort_reservation("r", writes_quiet=False, now=5.0)
    assert scheduler.pool.counts() == BlockCounts(total=8, free=5, cached=0, request=0, transfer=0, quarantine=3)
    assert (scheduler.pool.overdue(15.0), scheduler.pool.overdue(15.1)) == (0, 3)
    scheduler.release_quarantine("r")
    scheduler.release_quarantine("r")
    assert scheduler.pool.counts().free == 8


@pytest.mark.parametrize("writes_quiet", [True, False])
def test_blocks_that_were_verified_before_the_transfer_failed_are_found_by_the_next_attempt(writes_quiet: bool) -> None:
    scheduler = make_decode(8)
    slots = granted(scheduler, make_request("r", 14)).slots
    scheduler.abort_reservation("r", writes_quiet=writes_quiet, now=1.0, verified=(0, 1, 3))
    counts = scheduler.pool.counts()
    # Block 3 is only partly filled: it may be written on, and nobody looks for it.
    assert (counts.cached, counts.transfer, counts.request) == (2, 0, 0)
    scheduler.release_quarantine("r")
    assert scheduler.pool.counts() == BlockCounts(total=8, free=6, cached=2, request=0, transfer=0, quarantine=0)
    again = granted(scheduler, make_request("r", 14, attempt=2))
    assert again.num_held_blocks == 2
    assert [slot.index for slot in again.slots] == [2, 3]
    assert not {slot.block_id for slot in again.slots} & {slots[0].block_id, slots[1].block_id}
    assert scheduler.pool.check_integrity() == 0


def test_what_was_verified_behind_a_cached_prefix_is_named_as_what_it_is() -> None:
    scheduler = make_decode(8)
    granted(scheduler, make_request("a", 8, max_tokens=2))
    scheduler.commit("a", TOKEN, 0.0)
    run_until_idle(scheduler)
    assert granted(scheduler, make_request("b", 14)).num_held_blocks == 2
    scheduler.abort_reservation("b", writes_quiet=True, now=1.0, verified=(2,))
    assert granted(scheduler, make_request("c", 14)).num_held_blocks == 3
    assert scheduler.pool.check_integrity() == 0


def test_without_prefix_caching_verified_blocks_are_free() -> None:
    scheduler = make_decode(8, prefix_caching=False)
    granted(scheduler, make_request("r", 14))
    scheduler.abort_reservation("r", writes_quiet=True, now=1.0, verified=(0, 1))
    assert scheduler.pool.counts().free == 8


def test_an_aborted_request_lets_go_of_its_prefix_at_once_and_the_transfer_of_the_rest_later() -> None:
    scheduler = make_decode(8)
    granted(scheduler, make_request("a", 8, max_tokens=2))
    scheduler.commit("a", TOKEN, 0.0)
    run_until_idle(scheduler)
    request = make_request("b", 14)
    granted(scheduler, request)
    assert scheduler.abort("b") is request
    assert scheduler.pool.counts() == BlockCounts(total=8, free=4, cached=2, request=0, transfer=2, quarantine=0)
    assert not scheduler.has_work
    assert scheduler.abort_reservation("b", writes_quiet=True, now=1.0) is None
    assert scheduler.pool.counts().transfer == 0


def test_a_commit_for_an_aborted_request_is_refused_and_frees_its_blocks() -> None:
    scheduler = make_decode(8)
    granted(scheduler, make_request("r", 10))
    scheduler.abort("r")
    with pytest.raises(BatonError, match="waits for no blocks") as caught:
        scheduler.commit("r", TOKEN, 1.0)
    assert caught.value.code is ErrorCode.HANDOFF_FAILED
    assert scheduler.pool.counts().free == 8
    with pytest.raises(BatonError):
        scheduler.commit("stranger", TOKEN, 1.0)


def test_a_commit_of_an_older_attempt_does_not_touch_the_newer_one() -> None:
    scheduler = make_decode(16)
    granted(scheduler, make_request("r", 10))
    scheduler.abort("r")
    newer = make_request("r", 10, attempt=2)
    granted(scheduler, newer)
    with pytest.raises(BatonError):
        scheduler.commit("r", TOKEN, 1.0, attempt=1)
    assert newer.state is RequestState.AWAITING_KV
    assert scheduler.pool.counts().transfer == 3
    scheduler.commit("r", TOKEN, 1.0, attempt=2)
    assert newer.state is RequestState.RUNNING


def test_a_queued_reservation_is_aborted_from_either_side() -> None:
    scheduler = make_decode(max_num_seqs=1)
    granted(scheduler, make_request("a", 4))
    for index, give_up in enumerate(
        (scheduler.abort, lambda request_id: scheduler.abort_reservation(request_id, writes_quiet=False, now=0.0))
    ):
        request = make_request(f"q{index}", 4, first_token=100)
        assert reserve(scheduler, request) is None
        assert give_up(request.request_id) is request
    assert scheduler.stats().queued == 0
    assert scheduler.pool.counts().quarantine == 0


def test_every_wait_of_a_handoff_ends_at_the_requests_deadline() -> None:
    scheduler = make_decode(max_num_seqs=1)
    awaiting = make_request("a", 4, deadline_s=5.0)
    queued = make_request("b", 4, first_token=100, deadline_s=5.0)
    granted(scheduler, awaiting)
    reserve(scheduler, queued)
    assert scheduler.has_work, "somebody has to watch the deadlines"
    assert set(scheduler.schedule(5.0).expired) == {awaiting, queued}
    assert scheduler.pool.counts().transfer == 1, "the transfer has not let go yet"
    scheduler.abort_reservation("a", writes_quiet=True, now=5.0)
    assert scheduler.pool.counts().transfer == 0


def test_a_silent_transfer_is_overdue_and_a_renewed_one_is_not() -> None:
    scheduler = make_decode(transfer_lease_s=10.0)
    granted(scheduler, make_request("r", 8), 0.0)
    assert scheduler.pool.overdue(10.5) == 2
    scheduler.renew_lease("r", 1, 9.0)
    assert scheduler.pool.overdue(10.5) == 0


def test_names_that_differ_are_refused_before_a_block_is_given() -> None:
    scheduler = make_decode()
    request = make_request("r", 10)
    with pytest.raises(BatonError, match="differ from this worker's") as caught:
        scheduler.reserve(request, names_of(request)[::-1], 0.0)
    assert caught.value.code is ErrorCode.INCOMPATIBLE
    assert not scheduler.has_work
    assert scheduler.pool.counts().free == 32
    granted(scheduler, request)


def test_a_prompt_whose_first_token_must_be_its_last_is_not_handed_over() -> None:
    scheduler = make_decode()
    with pytest.raises(BatonError, match="ends with its first token"):
        reserve(scheduler, make_request("r", 10, max_tokens=1))
    assert not scheduler.has_work


def test_a_first_token_that_ends_the_request_is_refused_at_the_commit() -> None:
    scheduler = make_decode()
    request = make_request("r", 10, eos_token_ids=frozenset({1000}))
    granted(scheduler, request)
    with pytest.raises(BatonError, match="although its first token ends it"):
        scheduler.commit("r", TOKEN, 1.0)
    assert request.state is RequestState.FINISHED
    counts = scheduler.pool.counts()
    assert (counts.request, counts.transfer, counts.error) == (0, 0, 0)


def test_running_requests_wait_for_a_transfer_rather_than_drive_each_other_out_to_the_last() -> None:
    scheduler = make_decode(6, output_lengths=OutputLengthEstimator(prior_tokens=1))
    old = make_request("old", 8, max_tokens=10)
    granted(scheduler, old)
    scheduler.commit("old", TOKEN, 0.0)
    step(scheduler)  # takes its third block
    granted(scheduler, make_request("new", 12, max_tokens=3, first_token=100))
    for _ in range(3):
        step(scheduler)
    output, _ = step(scheduler)
    assert (shape(output), output.preempted) == ({}, []), "it keeps its blocks and waits"
    scheduler.commit("new", TOKEN, 1.0)
    output, _ = step(scheduler)
    assert [request.request_id for request in output.preempted] == ["new"]
    assert shape(output) == {"old": 1}
    run_until_idle(scheduler)
    assert old.num_output_tokens == 10


def test_a_retried_handoff_brings_the_tokens_that_were_generated_before() -> None:
    scheduler = make_decode()
    request = make_request("r", 10, attempt=2)
    request.token_ids += [1, 2]
    reservation = granted(scheduler, request)
    assert len(reservation.slots) == 3
    scheduler.commit("r", TOKEN, 1.0)
    _, updates = step(scheduler)
    assert updates["r"].first_index == 3
