"""Whose cached block makes room: of whoever has most of the pool for its weight, and of nobody else."""

from __future__ import annotations

import pytest

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold, Owner
from baton.services.core.sessions import SessionTag

NUM_BLOCKS = 100


def turn(
    pool: BlockPool, tenant: str, prompt: int, num_blocks: int, *, weight: float = 1.0, session: str | None = None
) -> int:
    """A request that begins and ends at once; how many of its blocks it found."""
    hold = Hold(Owner.REQUEST, f"{tenant}-{prompt}", tenant=tenant, weight=weight)
    if session is not None:
        hold.session = pool.retention.open(SessionTag(f"{tenant}/{session}", 1e5), pool.now_s, tenant, weight)
    names = [f"{tenant}-{prompt}-{index}".encode() for index in range(num_blocks)]
    hits = pool.lookup(names)
    pool.acquire(hits, hold)
    blocks = hits + pool.allocate(num_blocks - len(hits), hold)
    for block_id, name in zip(blocks, names, strict=True):
        pool.name_block(block_id, name)
    pool.release(blocks, hold)
    assert pool.check_integrity() == 0
    return len(hits)


def num_blocks(pool: BlockPool) -> dict[str, int]:
    return {share.tenant: share.num_blocks for share in pool.shares}


def flood(pool: BlockPool, tenant: str, num_prompts: int, *, weight: float = 1.0) -> None:
    for prompt in range(num_prompts):
        turn(pool, tenant, prompt, 7, weight=weight)


def test_a_flood_takes_what_nobody_else_wants_and_no_more() -> None:
    pool = BlockPool(NUM_BLOCKS, 16)
    flood(pool, "flood", 40)
    assert num_blocks(pool) == {"flood": NUM_BLOCKS}
    for prompt in range(4):
        assert turn(pool, "victim", prompt, 10) == 0
    flood(pool, "flood", 200)
    assert [turn(pool, "victim", prompt, 10) for prompt in range(4)] == [10] * 4
    assert num_blocks(pool) == {"flood": 60, "victim": 40}


def test_who_has_more_than_its_share_makes_room_for_itself() -> None:
    pool = BlockPool(NUM_BLOCKS, 16)
    flood(pool, "one", 100)
    flood(pool, "other", 100)
    assert num_blocks(pool) == {"one": 50, "other": 50}
    before = pool.num_evicted_for_others
    flood(pool, "one", 100)
    assert num_blocks(pool) == {"one": 50, "other": 50}
    assert pool.num_evicted_for_others == before


def test_shares_are_by_weight() -> None:
    pool = BlockPool(NUM_BLOCKS, 16)
    flood(pool, "light", 100, weight=1.0)
    flood(pool, "heavy", 100, weight=3.0)
    flood(pool, "light", 100, weight=1.0)
    assert num_blocks(pool) == {"light": 25, "heavy": 75}
    flood(pool, "light", 100, weight=3.0)  # its file has changed
    assert num_blocks(pool) == {"light": 50, "heavy": 50}
    flood(pool, "heavy", 100, weight=1.0)
    flood(pool, "light", 100, weight=3.0)
    assert num_blocks(pool) == {"light": 75, "heavy": 25}


def test_blocks_in_use_count_but_are_never_taken() -> None:
    pool = BlockPool(NUM_BLOCKS, 16)
    hold = Hold(Owner.REQUEST, "long", tenant="busy")
    held = pool.allocate(60, hold)
    flood(pool, "busy", 5)
    for prompt in range(4):
        turn(pool, "other", prompt, 10)
    # It is over its share by what runs, so that nothing of it stays cached, but what runs stays.
    assert num_blocks(pool) == {"busy": 60, "other": 40}
    flood(pool, "other", 20)
    assert num_blocks(pool) == {"busy": 60, "other": 40}
    assert {entry.block_id for entry in pool.ledger() if entry.request_refs} == set(held)


def test_of_one_tenant_the_block_used_longest_ago_goes_whatever_others_do() -> None:
    pool = BlockPool(12, 16)
    for prompt in range(3):
        turn(pool, "one", prompt, 2)
        turn(pool, "other", prompt, 2)
    turn(pool, "one", 0, 2)
    turn(pool, "new", 0, 3)
    # Three make room: two of one tenant and one of the other, each its oldest, of a prompt the tail first.
    found = {
        tenant: [len(pool.lookup([f"{tenant}-{prompt}-{index}".encode() for index in range(2)])) for prompt in range(3)]
        for tenant in ("one", "other")
    }
    assert found == {"one": [2, 0, 2], "other": [1, 2, 2]}


def test_a_tenant_that_has_nothing_any_more_is_forgotten() -> None:
    pool = BlockPool(8, 16)
    for number in range(500):
        turn(pool, f"tenant-{number}", 0, 3)
    assert len(pool.shares) <= 8
    assert len(pool.shares.by_blocks) < 100
    pool.clear_cache()
    assert len(pool.shares) == 0
    assert pool.counts().free == 8


def test_tenants_of_one_worker_that_come_and_go_one_by_one_leave_nothing_behind() -> None:
    pool = BlockPool(8, 16)
    for number in range(500):
        turn(pool, f"tenant-{number}", 0, 3)
        pool.clear_cache()
    assert len(pool.shares) == 0
    assert len(pool.shares.by_blocks) < 100


# Sessions.


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(NUM_BLOCKS, 16, 40)


def kept(pool: BlockPool) -> dict[str, int]:
    return {share.tenant: share.num_kept for share in pool.shares}


def test_one_tenant_may_keep_the_whole_budget_until_another_has_sessions(pool: BlockPool) -> None:
    for number in range(10):
        turn(pool, "greedy", number, 8, session=f"s{number}")
    assert kept(pool) == {"greedy": 40}
    turn(pool, "other", 0, 15, session="s")
    assert kept(pool) == {"greedy": 25, "other": 15}
    turn(pool, "other", 1, 15, session="t")
    assert kept(pool) == {"greedy": 20, "other": 20}
    for number in range(10):
        turn(pool, "greedy", number, 8, session=f"s{number}")
    assert kept(pool) == {"greedy": 20, "other": 20}
    assert pool.retention.num_kept == 40


def test_the_budget_is_shared_by_weight_too(pool: BlockPool) -> None:
    for number in range(10):
        turn(pool, "light", number, 8, session=f"s{number}")
    for number in range(10):
        turn(pool, "heavy", number, 8, weight=3.0, session=f"s{number}")
    assert kept(pool) == {"light": 10, "heavy": 30}


def test_a_session_outlives_its_own_tenant_s_flood_within_its_share(pool: BlockPool) -> None:
    turn(pool, "one", 0, 10, session="s")
    flood(pool, "one", 50)
    flood(pool, "other", 50)
    assert turn(pool, "one", 0, 10) == 10


def test_so_many_sessions_that_the_pool_knows_no_more_cost_only_their_own_tenant() -> None:
    pool = BlockPool(10, 16, 5)
    for number in range(3):
        pool.retention.open(SessionTag(f"victim/{number}", 50.0), 0.0, "victim")
    for number in range(50):
        pool.retention.open(SessionTag(f"flood/{number}", 86_400.0), 0.0, "flood")
    assert pool.retention.num_sessions == 10
    assert all(pool.retention.get(f"victim/{number}", 0.0) for number in range(3))
    assert pool.check_integrity() == 0


def test_a_session_that_is_called_another_tenant_s_begins_anew(pool: BlockPool) -> None:
    turn(pool, "one", 0, 4, session="s")
    pool.retention.open(SessionTag("one/s", 9.0), 0.0, "other")
    assert kept(pool)["one"] == 0
    assert pool.check_integrity() == 0
    pool.now_s = 10.0
    pool.retention.lapse(pool.now_s)
    assert "other" not in kept(pool)


def test_a_turn_that_took_longer_than_its_session_s_time_keeps_its_blocks(pool: BlockPool) -> None:
    hold = Hold(Owner.REQUEST, "slow", tenant="one")
    hold.session = pool.retention.open(SessionTag("one/s", 5.0), 0.0, "one")
    pool.now_s = 6.0
    pool.retention.lapse(pool.now_s)
    assert len(pool.shares) == 0
    (block_id,) = pool.allocate(1, hold)
    pool.name_block(block_id, b"n")
    pool.release([block_id], hold)
    assert kept(pool) == {"one": 1}
    assert pool.check_integrity() == 0
