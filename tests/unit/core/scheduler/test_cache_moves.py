"""Cached blocks that move: pinned while they are read, granted while they are written, cache afterwards, never leaked."""

from __future__ import annotations

import pytest
from helpers.scheduling import NAMER, make_decode, make_prefill, make_request, run_until_idle, step

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold, Owner
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.scheduler.cache_moves import CacheMoves

BLOCK_SIZE = 4
NAMES = NAMER.names(list(range(100, 124)), BLOCK_SIZE)  # six full blocks of one chain


class Pool:
    """A pool with its moves, and the leading ``num_cached`` of NAMES in it."""

    def __init__(self, num_blocks: int = 8, num_cached: int = 0) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.moves = CacheMoves(self.pool, 30.0)
        hold = Hold(Owner.REQUEST, "earlier")
        self.cached = self.pool.allocate(num_cached, hold)
        for block_id, name in zip(self.cached, NAMES, strict=False):
            self.pool.name_block(block_id, name)
        self.pool.release(self.cached, hold)

    def counts(self) -> tuple[int, int, int, int]:
        assert self.pool.check_integrity() == 0
        counts = self.pool.counts()
        return counts.free, counts.cached, counts.transfer, counts.quarantine

    def fill_all(self) -> None:
        """Takes every available block, so that whatever may be evicted is."""
        hold = Hold(Owner.REQUEST, "greedy")
        self.pool.release(self.pool.allocate(self.pool.num_available, hold), hold)


def test_the_leading_run_that_is_here_is_pinned_and_not_evicted() -> None:
    p = Pool(num_cached=3)
    assert p.moves.pin("r/1 to a", NAMES, 0.0) == p.cached
    assert p.counts() == (5, 0, 3, 0)
    p.fill_all()
    assert p.pool.lookup(NAMES) == p.cached
    p.moves.unpin("r/1 to a")
    p.moves.unpin("r/1 to a")
    assert p.counts() == (5, 3, 0, 0)
    p.fill_all()
    assert p.pool.lookup(NAMES) == []


def test_a_chain_without_its_head_is_not_given() -> None:
    p = Pool(num_cached=3)
    assert p.moves.pin("r/1", NAMES[3:], 0.0) == []
    assert p.counts() == (5, 3, 0, 0)
    assert p.moves.pin("r/1", NAMES, 0.0) == p.cached  # nothing of the first try is left
    with pytest.raises(BatonError, match="already being given"):
        p.moves.pin("r/1", NAMES, 0.0)
    p.moves.unpin("r/1")


def test_what_has_arrived_is_cache_that_anybody_finds() -> None:
    p = Pool(num_cached=2)
    slots = p.moves.reserve("r/1", NAMES[:5], 8, 0.0)
    assert [slot.index for slot in slots] == [2, 3, 4]
    assert [p.pool.generation(slot.block_id) for slot in slots] == [slot.generation for slot in slots]
    assert p.counts() == (3, 0, 5, 0)  # those that were here stay while the rest comes
    assert p.pool.lookup(NAMES) == p.cached
    p.moves.commit("r/1")
    assert p.counts() == (3, 5, 0, 0)
    assert p.pool.lookup(NAMES) == [*p.cached, *(slot.block_id for slot in slots)]
    assert set(p.pool.take_events().stored) == set(NAMES[:5])


def test_a_chain_that_came_is_evicted_from_its_tail() -> None:
    p = Pool(num_cached=2)
    p.moves.reserve("r/1", NAMES[:5], 8, 0.0)
    p.moves.commit("r/1")
    for length in (4, 3, 2, 1, 0):
        hold = Hold(Owner.REQUEST, f"eats all but {length}")
        p.pool.allocate(p.pool.num_available - length, hold)
        assert len(p.pool.lookup(NAMES)) == length


def test_only_what_is_missing_is_taken_even_from_the_middle() -> None:
    p = Pool(num_cached=5)
    hold = Hold(Owner.REQUEST, "renamer")
    p.pool.acquire([p.cached[1]], hold)
    p.pool.name_block(p.cached[1], b"another name of it")
    p.pool.release([p.cached[1]], hold)
    slots = p.moves.reserve("r/1", NAMES[:5], 8, 0.0)
    assert [slot.index for slot in slots] == [1]
    p.moves.commit("r/1")
    assert len(p.pool.lookup(NAMES)) == 5


def test_nothing_is_taken_where_everything_is_here() -> None:
    p = Pool(num_cached=4)
    assert p.moves.reserve("r/1", NAMES[:4], 8, 0.0) == ()
    p.moves.commit("r/1")
    assert p.counts() == (4, 4, 0, 0)


def test_without_room_it_is_refused_and_nothing_changes() -> None:
    p = Pool(num_cached=1)
    for room in (5, -1):
        with pytest.raises(BatonError) as refusal:
            p.moves.reserve("r/1", NAMES[:6], room, 0.0)  # five new ones, and the one that is here
        assert refusal.value.code is ErrorCode.OVERLOADED
    assert p.counts() == (7, 1, 0, 0)
    assert len(p.moves.reserve("r/1", NAMES[:6], 6, 0.0)) == 5


def test_a_block_that_came_twice_is_kept_once() -> None:
    p = Pool()
    p.moves.reserve("r/1", NAMES[:2], 8, 0.0)
    p.moves.reserve("s/1", NAMES[:2], 8, 0.0)
    p.moves.commit("r/1")
    p.moves.commit("s/1")
    assert p.counts() == (6, 2, 0, 0)


def test_given_up_its_blocks_are_free_once_writes_are_quiet() -> None:
    p = Pool(num_cached=2)
    p.moves.reserve("quiet/1", NAMES[:4], 8, 0.0)
    p.moves.let_go("quiet/1", writes_quiet=True, now=1.0)
    assert p.counts() == (6, 2, 0, 0)
    p.moves.reserve("late/1", NAMES[:4], 8, 0.0)
    p.moves.let_go("late/1", writes_quiet=False, now=1.0)
    assert p.counts() == (4, 2, 0, 2)
    with pytest.raises(BatonError, match="any more"):
        p.moves.commit("late/1")
    p.moves.let_go("late/1", writes_quiet=False, now=1.0)
    p.moves.let_go("late/1", writes_quiet=True, now=2.0)
    p.moves.let_go("late/1", writes_quiet=True, now=2.0)
    assert p.counts() == (6, 2, 0, 0)
    assert p.pool.lookup(NAMES) == p.cached


def test_the_same_move_cannot_be_taken_twice_and_an_unknown_one_not_committed() -> None:
    p = Pool()
    p.moves.reserve("r/1", NAMES[:2], 8, 0.0)
    with pytest.raises(BatonError, match="already being taken"):
        p.moves.reserve("r/1", NAMES[:2], 8, 0.0)
    with pytest.raises(BatonError, match="any more"):
        p.moves.commit("other/1")


def test_leases_are_renewed_but_quarantine_is_not_prolonged() -> None:
    p = Pool(num_cached=2)
    p.moves.pin("given/1", NAMES[:2], 0.0)
    p.moves.reserve("taken/1", NAMES[2:4], 8, 0.0)
    assert p.pool.overdue(29.0) == 0
    assert p.pool.overdue(31.0) == 4
    p.moves.renew(["given/1", "taken/1", "unknown/1"], 20.0)
    assert p.pool.overdue(31.0) == 0
    p.moves.let_go("taken/1", writes_quiet=False, now=20.0)
    p.moves.renew(["given/1", "taken/1"], 40.0)
    assert p.pool.overdue(51.0) == 2


def test_a_prompt_finds_what_was_fetched_for_it() -> None:
    scheduler = make_prefill()
    request = make_request("r", 10, first_token=100)
    scheduler.moves.reserve("r/1", NAMES[:2], scheduler.room_for_moves(), 0.0)
    scheduler.moves.commit("r/1")
    scheduler.add(request)
    output, updates = step(scheduler)
    assert output.num_tokens == 2
    prefill = updates["r"].prefill
    assert prefill is not None
    assert prefill.num_cached_tokens == 8


def test_what_is_fetched_takes_no_room_from_the_head_of_the_queue() -> None:
    prefill = make_prefill(num_blocks=8)
    assert prefill.room_for_moves() == 8
    prefill.add(make_request("r", 20))
    assert prefill.room_for_moves() == 3
    prefill.add(make_request("s", 20, first_token=50))
    assert prefill.room_for_moves() == 3


def test_what_is_fetched_takes_no_room_that_running_answers_will_need() -> None:
    decode = make_decode(num_blocks=8, max_num_seqs=1)
    decode.add(make_request("r", 4, max_tokens=9))
    step(decode)
    # One block is taken and two more are promised.
    assert decode.room_for_moves() == 5
    decode.add(make_request("s", 12, first_token=50))
    assert decode.room_for_moves() == 2
    run_until_idle(decode)
    assert decode.room_for_moves() == 8
