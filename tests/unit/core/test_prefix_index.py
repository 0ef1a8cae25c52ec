"""The gateway's idea of who holds which blocks."""

from __future__ import annotations

from baton.services.core.prefix_index import PrefixIndex

A, B, C, D = (bytes([i]) * 16 for i in range(4))


def test_the_longest_gapless_prefix_counts_for_each_worker() -> None:
    index = PrefixIndex()
    assert index.apply("p0", "i", 1, [A, B, C], [])
    assert index.apply("p1", "i", 1, [A, C], [])
    assert index.apply("p2", "i", 1, [B], [])
    assert index.matches([A, B, C, D]) == {"p0": 3, "p1": 1}
    assert index.matches([]) == {}
    assert index.matches([D]) == {}


def test_removed_blocks_are_forgotten() -> None:
    index = PrefixIndex()
    index.apply("p0", "i", 1, [A, B], [])
    assert index.apply("p0", "i", 2, [], [B])
    assert index.matches([A, B]) == {"p0": 1}
    index.apply("p0", "i", 3, [], [A, D])
    assert len(index) == 0


def test_a_gap_asks_for_a_snapshot_and_the_snapshot_replaces_everything() -> None:
    index = PrefixIndex()
    index.apply("p0", "i", 1, [A], [])
    assert not index.apply("p0", "i", 3, [C], [])
    assert index.apply("p0", "i", 5, [B], [], snapshot=True)
    assert index.matches([A]) == {}
    assert index.matches([B]) == {"p0": 1}
    assert index.apply("p0", "i", 6, [A], [])


def test_a_repeated_message_changes_nothing() -> None:
    index = PrefixIndex()
    index.apply("p0", "i", 1, [A], [])
    index.apply("p0", "i", 2, [], [A])
    assert index.apply("p0", "i", 1, [A], [])
    assert index.matches([A]) == {}


def test_a_new_incarnation_starts_with_an_empty_cache() -> None:
    index = PrefixIndex()
    index.apply("p0", "old", 1, [A], [])
    assert index.apply("p0", "new", 1, [B], [])
    assert index.matches([A]) == {}
    assert index.matches([B]) == {"p0": 1}


def test_workers_that_come_and_go_never_share_a_bit() -> None:
    index = PrefixIndex()
    index.apply("p0", "i", 1, [A], [])
    index.apply("p1", "i", 1, [B], [])
    index.forget("p0")
    index.apply("p2", "i", 1, [C], [])
    index.apply("p3", "i", 1, [D], [])
    assert [index.matches([name]) for name in (A, B, C, D)] == [{}, {"p1": 1}, {"p2": 1}, {"p3": 1}]
    index.forget("never-seen")
