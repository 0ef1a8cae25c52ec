"""What conversations keep: whose turn is later, whose is first, and whose is what it always was."""

from __future__ import annotations

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold, Owner
from baton.services.core.sessions import SessionTag


def request(name: str = "r") -> Hold:
    return Hold(Owner.REQUEST, name)


def turn(pool: BlockPool, tokens: str, session: str | None = None, ttl_s: float = 100.0) -> list[int]:
    """A request whose blocks are called by the letters up to each; it ends at once. Its blocks."""
    hold = request(tokens)
    if session is not None:
        hold.session = pool.retention.open(SessionTag(session, ttl_s), pool.now_s)
    names = [tokens[: index + 1].encode() for index in range(len(tokens))]
    hits = pool.lookup(names)
    pool.acquire(hits, hold)
    blocks = hits + pool.allocate(len(names) - len(hits), hold)
    for block_id, name in zip(blocks, names, strict=True):
        pool.name_block(block_id, name)
    pool.release(blocks, hold)
    assert pool.check_integrity() == 0
    return blocks


def found(pool: BlockPool, tokens: str) -> int:
    """How much of a prompt is there."""
    return len(pool.lookup([tokens[: index + 1].encode() for index in range(len(tokens))]))


def order(pool: BlockPool) -> list[int]:
    """In which everything is reused; it is gone then."""
    return pool.allocate(pool.num_available, request("all"))


def flood(pool: BlockPool, num_blocks: int) -> None:
    for number in range(num_blocks):
        turn(pool, chr(0x100 + number))


def test_what_a_session_keeps_outlives_a_flood_and_what_nobody_keeps_does_not() -> None:
    pool = BlockPool(8, 16, 4)
    turn(pool, "abc", "s")
    turn(pool, "xyz")
    flood(pool, 20)
    assert (found(pool, "abc"), found(pool, "xyz")) == (3, 0)
    assert pool.num_available == 8


def test_kept_blocks_are_never_in_the_way() -> None:
    pool = BlockPool(4, 16, 4)
    blocks = turn(pool, "abcd", "s")
    assert pool.num_available == 4
    assert pool.allocate(3, request()) == [blocks[3], blocks[2], blocks[1]]  # from the tail
    assert pool.retention.num_kept == 1
    assert found(pool, "abcd") == 1


def test_among_sessions_the_one_whose_time_is_over_soonest_gives_first() -> None:
    pool = BlockPool(4, 16, 4)
    late, soon = turn(pool, "ab", "late", ttl_s=50.0), turn(pool, "xy", "soon", ttl_s=20.0)
    assert order(pool) == [soon[1], soon[0], late[1], late[0]]


def test_another_turn_begins_the_time_anew() -> None:
    pool = BlockPool(4, 16, 4)
    first, second = turn(pool, "ab", "first", ttl_s=20.0), turn(pool, "xy", "second", ttl_s=25.0)
    pool.now_s = 10.0
    turn(pool, "ab", "first", ttl_s=20.0)
    assert order(pool) == [second[1], second[0], first[1], first[0]]


def test_a_budget_is_kept_from_the_head_and_by_the_later_end() -> None:
    pool = BlockPool(12, 16, 3)
    turn(pool, "abcde", "long")
    assert pool.retention.num_kept == 3
    flood(pool, 20)
    assert found(pool, "abcde") == 3
    turn(pool, "xy", "later", ttl_s=200.0)
    assert pool.retention.num_kept == 3
    flood(pool, 20)
    assert (found(pool, "abcde"), found(pool, "xy")) == (1, 2)
    turn(pool, "pq", "sooner", ttl_s=5.0)  # would be the first to give: it gets nothing
    flood(pool, 20)
    assert (found(pool, "abcde"), found(pool, "xy"), found(pool, "pq")) == (1, 2, 0)


def test_a_session_gives_up_an_old_branch_for_its_new_turn() -> None:
    pool = BlockPool(12, 16, 4)
    turn(pool, "abcd", "s")
    turn(pool, "abxy", "s")
    flood(pool, 20)
    assert (found(pool, "abcd"), found(pool, "abxy")) == (2, 4)


def test_a_closed_session_s_own_blocks_go_first_and_shared_ones_stay() -> None:
    pool = BlockPool(8, 16, 6)
    older = turn(pool, "mn")
    first = turn(pool, "abcd", "first")
    turn(pool, "ab", "second")
    assert pool.retention.close("first", pool.now_s)
    assert not pool.retention.close("first", pool.now_s)
    assert found(pool, "abcd") == 4  # until somebody needs the room
    num_free = pool.counts().free
    assert pool.allocate(num_free + 3, request())[num_free:] == [first[3], first[2], older[1]]
    assert found(pool, "abcd") == 2


def test_a_request_that_ends_after_its_session_was_closed_leaves_nothing_to_keep() -> None:
    pool = BlockPool(4, 16, 4)
    turn(pool, "mn")
    hold = request()
    hold.session = pool.retention.open(SessionTag("s", 9.0), 0.0)
    blocks = pool.allocate(2, hold)
    for block_id, name in zip(blocks, (b"a", b"ab"), strict=True):
        pool.name_block(block_id, name)
    pool.retention.close("s", 0.0)
    pool.release(blocks, hold)
    assert pool.retention.get("s", 0.0) is None
    assert pool.allocate(2, request()) == [blocks[1], blocks[0]]


def test_when_its_time_is_over_the_order_is_that_of_a_pool_that_knows_no_sessions() -> None:
    pool, plain = BlockPool(8, 16, 5), BlockPool(8, 16)
    for one in (pool, plain):
        for tokens, session in (("ab", "s"), ("xy", None), ("cd", "t"), ("uv", None)):
            turn(one, tokens, session if one is pool else None, ttl_s=30.0)
    pool.now_s = 30.0
    assert pool.retention.num_sessions == 2  # nothing happens before somebody asks
    assert order(pool) == order(plain)
    assert pool.retention.num_kept == pool.retention.num_sessions == 0


def test_also_of_blocks_that_a_flood_had_passed_over() -> None:
    pool = BlockPool(6, 16, 4)
    first, second = turn(pool, "ab", "s", ttl_s=30.0), turn(pool, "cd", "t", ttl_s=20.0)
    flood(pool, 5)
    pool.now_s = 20.0
    assert pool.allocate(1, request()) == [second[1]]
    pool.now_s = 30.0
    assert pool.allocate(3, request()) == [first[1], first[0], second[0]]  # the older first


def test_sessions_are_bounded_by_the_blocks_of_the_pool() -> None:
    pool = BlockPool(3, 16, 3)
    for number in range(5):
        pool.retention.open(SessionTag(f"s{number}", 10.0 + number), 0.0)
    assert pool.retention.num_sessions == 3
    assert pool.retention.get("s1", 0.0) is None
    assert pool.retention.get("s4", 0.0) is not None


def test_many_turns_leave_nothing_behind() -> None:
    pool = BlockPool(8, 16, 4)
    for number in range(3_000):
        pool.now_s = float(number)
        turn(pool, "abc", "s")
        turn(pool, "ab", f"t{number % 3}", ttl_s=1.5)
        if number % 5 == 0:
            pool.retention.close("s", pool.now_s)
    (share,) = pool.shares
    heaps = (share.loose, share.by_expiry, share.with_blocks, pool.retention._by_expiry, pool.shares.by_blocks)
    assert max(map(len, heaps)) < 200


def test_without_a_budget_sessions_are_known_and_keep_nothing() -> None:
    pool = BlockPool(4, 16)
    turn(pool, "ab", "s")
    flood(pool, 6)
    assert found(pool, "ab") == 0
    assert pool.retention.get("s", 0.0) is not None


def test_a_cache_that_is_cleared_keeps_nothing() -> None:
    pool = BlockPool(6, 16, 4)
    turn(pool, "abc", "s")
    flood(pool, 8)
    assert pool.clear_cache() == 6
    assert pool.retention.num_kept == 0
    assert pool.counts().free == 6
    assert pool.check_integrity() == 0
