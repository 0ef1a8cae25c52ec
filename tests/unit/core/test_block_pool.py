"""The block pool: owners, names, reuse order and the ledger."""

from __future__ import annotations

import pytest

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import BlockCounts, BlockState, Hold, Owner


def name(index: int) -> bytes:
    return index.to_bytes(16, "big")


def request(holder: str = "r", deadline_s: float | None = None) -> Hold:
    return Hold(Owner.REQUEST, holder, deadline_s)


def transfer(holder: str = "r/1", deadline_s: float | None = None) -> Hold:
    return Hold(Owner.TRANSFER, holder, deadline_s)


def cached_chain(pool: BlockPool, first: int, length: int) -> list[int]:
    """``length`` cached blocks called name(first), name(first + 1), ..."""
    hold = request()
    blocks = pool.allocate(length, hold)
    for index, block_id in enumerate(blocks, start=first):
        assert pool.name_block(block_id, name(index))
    pool.release(blocks, hold)
    return blocks


def states(pool: BlockPool) -> dict[int, BlockState]:
    return {entry.block_id: entry.state for entry in pool.ledger()}


def test_unnamed_blocks_are_reused_before_cached_ones_and_newest_first() -> None:
    pool = BlockPool(4, 16)
    chain = cached_chain(pool, 0, 2)
    hold = request()
    [partial] = pool.allocate(1, hold)
    pool.release([partial], hold)
    assert pool.allocate(1, hold) == [partial]
    assert pool.lookup([name(0), name(1)]) == chain


def test_eviction_takes_the_least_recently_released_and_the_tail_of_a_chain_first() -> None:
    pool = BlockPool(4, 16)
    first, second = cached_chain(pool, 0, 2), cached_chain(pool, 10, 2)
    user = request()
    pool.acquire(first[:1], user)  # a hit on the older chain's head makes that block the newest
    pool.release(first[:1], user)
    assert pool.allocate(4, request()) == [first[1], second[1], second[0], first[0]]


def test_a_prefix_is_found_as_far_as_it_is_known() -> None:
    pool = BlockPool(4, 16)
    chain = cached_chain(pool, 0, 3)
    assert pool.lookup([name(0), name(1), name(9), name(2)]) == chain[:2]
    assert pool.lookup([name(9), name(0)]) == []


def test_blocks_can_be_found_while_a_request_holds_them() -> None:
    pool = BlockPool(2, 16)
    hold = request()
    blocks = pool.allocate(1, hold)
    pool.name_block(blocks[0], name(0))
    assert pool.lookup([name(0)]) == blocks


def test_a_block_grows_a_generation_at_each_reuse() -> None:
    pool = BlockPool(1, 16)
    hold = request()
    for generation in (1, 2, 3):
        [block] = pool.allocate(1, hold)
        assert pool.generation(block) == generation
        pool.release([block], hold)


def test_a_block_is_reusable_only_when_request_and_transfer_both_let_go() -> None:
    pool = BlockPool(1, 16)
    user, sender = request(), transfer()
    [block] = pool.allocate(1, user)
    pool.acquire([block], sender)
    assert states(pool) == {block: BlockState.REQUEST}
    pool.release([block], user)
    assert states(pool) == {block: BlockState.TRANSFER}
    assert pool.num_available == 0
    pool.acquire([block], user)
    pool.release([block], sender)
    assert states(pool) == {block: BlockState.REQUEST}
    pool.release([block], user)
    assert pool.num_available == 1
    assert pool.check_integrity() == 0


def test_allocation_beyond_what_is_there_changes_nothing() -> None:
    pool = BlockPool(3, 16)
    chain = cached_chain(pool, 0, 2)
    with pytest.raises(ValueError, match="4 blocks wanted, 3 of 3 available"):
        pool.allocate(4, request())
    assert pool.lookup([name(0), name(1)]) == chain
    assert pool.counts() == BlockCounts(total=3, free=1, cached=2, request=0, transfer=0, quarantine=0)


def test_of_two_equal_blocks_the_second_stays_unnamed_and_is_reused_first() -> None:
    pool = BlockPool(2, 16)
    hold = request()
    first, second = pool.allocate(2, hold)
    assert pool.name_block(first, name(0))
    assert not pool.name_block(second, name(0))
    pool.release([first, second], hold)
    assert pool.lookup([name(0)]) == [first]
    assert pool.allocate(1, hold) == [second]


def test_a_partial_block_that_filled_up_changes_its_name() -> None:
    pool = BlockPool(1, 16)
    hold = request()
    [block] = pool.allocate(1, hold)
    assert pool.name_block(block, name(0))
    assert pool.name_block(block, name(1))
    assert pool.name_block(block, name(1)), "naming it again is no change"
    assert pool.lookup([name(0)]) == []
    assert pool.lookup([name(1)]) == [block]
    assert pool.check_integrity() == 0


def test_events_tell_what_can_be_found_since_the_last_time() -> None:
    pool = BlockPool(2, 16)
    cached_chain(pool, 0, 2)
    events = pool.take_events()
    assert (set(events.stored), events.removed) == ({name(0), name(1)}, ())
    cached_chain(pool, 5, 1)
    assert pool.take_events().removed == (name(1),)
    assert pool.take_events().stored == pool.take_events().removed == ()
    assert set(pool.names()) == {name(0), name(5)}


def test_a_name_that_came_and_went_between_two_looks_is_gone() -> None:
    pool = BlockPool(1, 16)
    cached_chain(pool, 0, 1)
    cached_chain(pool, 1, 1)
    events = pool.take_events()
    assert (events.stored, events.removed) == ((name(1),), (name(0),))


def test_quarantined_blocks_stay_out_of_use_until_no_write_can_land() -> None:
    pool = BlockPool(2, 16)
    incoming = transfer(deadline_s=5.0)
    blocks = pool.allocate(2, incoming)
    pool.quarantine(blocks, incoming)
    assert pool.counts() == BlockCounts(total=2, free=0, cached=0, request=0, transfer=0, quarantine=2)
    assert pool.num_available == 0
    assert [(entry.handoff, entry.deadline_s) for entry in pool.ledger()] == [("r/1", 5.0)] * 2
    with pytest.raises(ValueError, match="not transfer r/1's alone"):
        pool.quarantine(blocks, incoming)
    pool.release_quarantine(blocks)
    assert pool.counts().free == 2
    with pytest.raises(ValueError, match="not in quarantine"):
        pool.release_quarantine(blocks[:1])
    assert pool.check_integrity() == 0


def test_a_block_that_a_request_shares_is_not_quarantined() -> None:
    pool = BlockPool(1, 16)
    incoming = transfer()
    blocks = pool.allocate(1, incoming)
    pool.acquire(blocks, request())
    with pytest.raises(ValueError, match="alone"):
        pool.quarantine(blocks, incoming)


def test_the_ledger_shows_holders_and_the_earliest_deadline() -> None:
    pool = BlockPool(3, 16)
    user, sender = request("r7", deadline_s=9.0), transfer("r7/2", deadline_s=4.0)
    blocks = pool.allocate(1, user)
    pool.name_block(blocks[0], name(0))
    pool.acquire(blocks, sender)
    [entry] = pool.ledger()
    assert (entry.state, entry.request_id, entry.handoff, entry.deadline_s) == (BlockState.REQUEST, "r7", "r7/2", 4.0)
    assert (entry.name, entry.request_refs, entry.transfer_refs, entry.generation) == (name(0), 1, 1, 1)


def test_blocks_are_overdue_past_their_holders_deadline_and_a_renewal_helps() -> None:
    pool = BlockPool(3, 16)
    sender, user = transfer(deadline_s=10.0), request()
    pool.allocate(2, sender)
    pool.allocate(1, user)
    assert pool.overdue(10.0) == 0
    assert pool.overdue(10.1) == 2
    sender.deadline_s = 20.0
    assert pool.overdue(10.1) == 0


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool, user: pool.release([0], request("stranger")),
        lambda pool, user: pool.acquire([2], user),
        lambda pool, user: pool.name_block(2, name(0)),
        lambda pool, user: pool.release([0, 0], user),
    ],
    ids=["let go of what another holds", "share a free block", "name a free block", "let go twice"],
)
def test_misuse_is_an_error_and_not_a_broken_ledger(misuse) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(3, 16)
    user = request()
    pool.allocate(1, user)
    with pytest.raises(ValueError):
        misuse(pool, user)
    assert pool.counts().error == 0


def test_the_cache_can_be_cleared_without_touching_what_is_held() -> None:
    pool = BlockPool(3, 16)
    cached_chain(pool, 0, 2)
    hold = request()
    [held] = pool.allocate(1, hold)
    pool.name_block(held, name(7))
    assert pool.clear_cache() == 2
    assert pool.names() == (name(7),)
    assert pool.counts().free == 2
    assert pool.check_integrity() == 0


def test_the_integrity_check_notices_a_lost_block() -> None:
    pool = BlockPool(3, 16)
    pool._free.pop()
    assert pool.counts().error == 1
    with pytest.raises(RuntimeError, match="3 blocks are in state free, but 2 are counted"):
        pool.check_integrity()


def test_the_integrity_check_notices_a_holder_that_lost_count() -> None:
    pool = BlockPool(3, 16)
    hold = request()
    pool.allocate(2, hold)
    hold.num_blocks = 1
    with pytest.raises(RuntimeError, match="holders count 1 blocks, the blocks 2"):
        pool.check_integrity()


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="0 blocks"):
        BlockPool(0, 16)
