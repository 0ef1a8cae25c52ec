"""Which pairs are probed ahead of need."""

from __future__ import annotations

from baton.services.core.link_plan import ALL_PAIRS, pairs_to_probe
from baton.services.core.links import PairKey
from baton.services.core.router import Role, WorkerView


def workers(role: Role, count: int, num_hosts: int) -> list[WorkerView]:
    return [
        WorkerView(f"{role}-{n}", f"{role}-{n}", role, "h:1", "x", host_id=f"h{n % num_hosts}") for n in range(count)
    ]


def test_of_a_small_cluster_every_pair_is_probed() -> None:
    prefill, decode = workers(Role.PREFILL, 8, 4), workers(Role.DECODE, 32, 4)
    assert len(prefill) * len(decode) == ALL_PAIRS
    pairs = pairs_to_probe(prefill, decode)
    assert sorted(pairs) == sorted(PairKey(one.incarnation, other.incarnation) for one in prefill for other in decode)
    assert pairs_to_probe([], decode) == pairs_to_probe(prefill, []) == []


def test_of_a_large_one_each_worker_has_a_few_pairs_and_its_neighbours_are_among_them() -> None:
    prefill, decode = workers(Role.PREFILL, 500, 125), workers(Role.DECODE, 500, 125)
    pairs = pairs_to_probe(prefill, decode)
    assert len(pairs) == len(set(pairs)) <= 500 * 8
    assert {pair.prefill for pair in pairs} == {one.incarnation for one in prefill}
    assert {pair.decode for pair in pairs} == {other.incarnation for other in decode}
    near = {
        PairKey(one.incarnation, other.incarnation)
        for one in prefill
        for other in decode
        if one.host_id == other.host_id
    }
    assert near <= set(pairs)


def test_who_comes_or_goes_changes_the_pairs_of_a_few_others() -> None:
    prefill, decode = workers(Role.PREFILL, 100, 25), workers(Role.DECODE, 100, 25)
    before = set(pairs_to_probe(prefill, decode))
    after = set(pairs_to_probe(prefill[:50] + prefill[51:], decode[:70] + decode[71:]))
    lost = {pair for pair in before - after if (pair.prefill, pair.decode) == (prefill[50].incarnation, pair.decode)}
    lost |= {pair for pair in before - after if pair.decode == decode[70].incarnation}
    assert len(before ^ after) <= 2 * len(lost) + 20
    assert not {pair for pair in after if prefill[50].incarnation == pair.prefill}
