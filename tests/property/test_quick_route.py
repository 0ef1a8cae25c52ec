"""A choice among few workers costs what the router's arithmetic says, and little more than the cheapest of all."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.services.core.cost_model import OTHER_HOST, SAME_HOST, WorkerCost
from baton.services.core.errors import BatonError
from baton.services.core.fetch import FetchMode, FetchPolicy
from baton.services.core.fleet import LANE_SPREAD, Fleet
from baton.services.core.links import LinkMatrix, PairKey, ProbeResult
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.pricing import price_local, price_remote, price_whole
from baton.services.core.quick_route import FleetRouter
from baton.services.core.router import Answer, Placement, Role, RoutedRequest, WorkerView, route

NAMES = [bytes([number]) * 16 for number in range(40)]
BLOCK_BYTES = 65536


@dataclass
class Cluster:
    workers: list[WorkerView]
    index: PrefixIndex
    links: LinkMatrix
    request: RoutedRequest

    def quick(self, placement: Placement) -> FleetRouter:
        fleet = Fleet()
        for worker in self.workers:
            fleet.put(worker)
        return FleetRouter(fleet, self.index, few_pairs=0)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Workers of nearly equal speed on a few hosts; some of them hold the same leading blocks of a prompt."""
    workers = []
    index = PrefixIndex()
    depth = draw(st.integers(0, len(NAMES)))
    roles = [Role.PREFILL] * draw(st.integers(1, 5)) + [Role.DECODE] * draw(st.integers(1, 5))
    for number, role in enumerate(roles):
        worker = WorkerView(
            worker_id=f"w{number}",
            incarnation=f"i{number}",
            role=role,
            address=f"h:{number}",
            compatibility="same",
            host_id=draw(st.sampled_from(["a", "b", "c", ""])),
            queued_tokens=draw(st.integers(0, 5000)) if role is Role.PREFILL else 0,
            running=draw(st.integers(0, 20)) if role is Role.DECODE else 0,
            max_num_seqs=16,
            max_num_batched_tokens=draw(st.sampled_from([128, 2048])),
            cost=WorkerCost(
                prefill_s_per_token=200e-6 * draw(st.sampled_from([1.0, 1.05, 3.0])),
                curiosity=draw(st.sampled_from([0.0, 0.0, 0.2])),
            ),
        )
        workers.append(worker)
        if depth and draw(st.booleans()):
            index.apply(worker.worker_id, worker.incarnation, 1, NAMES[:depth], ())
    links = LinkMatrix()
    for one in workers:
        for other in workers:
            if one.role is Role.PREFILL and other.role is Role.DECODE and draw(st.integers(0, 3)) == 0:
                measured = ProbeResult(
                    "tcp", True, draw(st.sampled_from([0.5, 3.0])), draw(st.sampled_from([1.0, 8.0]))
                )
                links.on_probe(PairKey(one.incarnation, other.incarnation), measured, 0.0)
    fetch = draw(st.sampled_from([None, FetchPolicy(FetchMode.OFF), FetchPolicy(FetchMode.AUTO)]))
    num_tokens = draw(st.integers(1, 16 * len(NAMES)))
    return Cluster(workers, index, links, RoutedRequest("r", num_tokens, 16, BLOCK_BYTES, {}, fetch=fetch))


@settings(max_examples=60, deadline=None)
@given(clusters(), st.sampled_from(list(Placement)))
def test_what_is_chosen_among_few_is_priced_exactly_and_hardly_dearer_than_the_cheapest(
    cluster: Cluster, placement: Placement
) -> None:
    names = NAMES[: -(-cluster.request.num_tokens // 16)]
    quick = cluster.quick(placement).route(cluster.request, names, placement, cluster.links, 0.0).chosen
    known = dataclasses.replace(cluster.request, cached_blocks=cluster.index.matches(names))
    whole = route(known, cluster.workers, placement, cluster.links, 0.0).chosen
    assert (quick.prefill is None) == (whole.prefill is None) or placement is Placement.AUTO

    if quick.fetch is None:
        unfetched = dataclasses.replace(known, fetch=None)
        if quick.prefill is None:
            exact = price_local(unfetched, quick.decode, cluster.workers, cluster.links, 0.0)
        else:
            exact = price_remote(unfetched, quick.prefill, quick.decode, cluster.workers, cluster.links, 0.0)
        assert abs(exact.price_s - quick.price_s) < 1e-9

    # The dearest link for all blocks instead of the cheapest for none, for the handoff and for a fetch; a slower worker of the
    # same lane, and what is given for curiosity, which the order of a lane does not know.
    num_bytes = len(names) * BLOCK_BYTES
    measured = [cluster.links.cost(pair) for pair in cluster.links.pairs()]
    costs = [OTHER_HOST, SAME_HOST, *(cost for cost in measured if cost is not None)]
    links_s = max(cost.transfer_s(num_bytes) for cost in costs) - min(cost.fixed_s for cost in costs)
    is_fetched = cluster.request.fetch is not None and cluster.request.fetch.mode is not FetchMode.OFF
    lane_s = (LANE_SPREAD - 1 + 0.2) * (quick.prefill_s + quick.queue_s)
    if quick.prefill is None:
        lane_s *= 1 + quick.decode.running  # those beside it wait as long
    assert quick.price_s <= whole.price_s + (1 + is_fetched) * links_s + lane_s + 1e-6


@st.composite
def even_clusters(draw: st.DrawFn) -> Cluster:
    """Workers of one speed, all as far from each other; each holds as many leading blocks as it likes. Blocks of next to no
    bytes, so that where they are counts for who prefills alone."""
    workers = []
    index = PrefixIndex()
    roles = [Role.PREFILL] * draw(st.integers(1, 8)) + [Role.DECODE] * draw(st.integers(1, 5))
    for number, role in enumerate(roles):
        is_prefill = role is Role.PREFILL
        worker = WorkerView(
            worker_id=f"w{number}",
            incarnation=f"i{number}",
            role=role,
            address=f"h:{number}",
            compatibility="same",
            queued_tokens=draw(st.integers(0, 800)) if is_prefill else 0,
            running=0 if is_prefill else draw(st.integers(0, 20)),
            cost=WorkerCost(prefill_s_per_token=200e-6),
        )
        workers.append(worker)
        depth = draw(st.sampled_from([0, 1, 2, 10, 20, 30, len(NAMES)]))
        index.apply(worker.worker_id, worker.incarnation, 1, NAMES[:depth], ())
    fetch = draw(st.sampled_from([None, FetchPolicy(FetchMode.OFF), FetchPolicy(FetchMode.AUTO)]))
    request = RoutedRequest("r", draw(st.integers(1, 16 * len(NAMES))), 16, 1, {}, fetch=fetch)
    return Cluster(workers, index, LinkMatrix(), request)


@settings(max_examples=150, deadline=None)
@given(even_clusters())
def test_among_workers_alike_the_choice_is_the_cheapest_of_all(cluster: Cluster) -> None:
    names = NAMES[: -(-cluster.request.num_tokens // 16)]
    quick = cluster.quick(Placement.REMOTE).route(cluster.request, names, Placement.REMOTE, cluster.links, 0.0)
    known = dataclasses.replace(cluster.request, cached_blocks=cluster.index.matches(names))
    whole = route(known, cluster.workers, Placement.REMOTE, cluster.links, 0.0)
    assert abs(quick.chosen.price_s - whole.chosen.price_s) < 2e-6
    assert quick.runner_up is not None
    assert whole.runner_up is not None
    assert quick.runner_up.price_s >= whole.runner_up.price_s - 2e-6 or quick.runner_up.prefill is None


@pytest.mark.parametrize("num_holders", [0, 3, 30, 140])
def test_of_many_holders_of_a_prefix_the_least_loaded_prefills(num_holders: int) -> None:
    draw = random.Random(num_holders)
    fleet, index = Fleet(), PrefixIndex()
    for number in range(200):
        role = Role.DECODE if number % 4 == 3 else Role.PREFILL
        load = draw.randrange(4000)
        running = load // 100 if role is Role.DECODE else 0
        fleet.put(WorkerView(f"w{number}", f"w{number}", role, "h:1", "same", queued_tokens=load, running=running))
    fleet.set_load("w0", 9000, 0)  # it grew since it got its place
    for number in draw.sample(range(200), num_holders):
        index.apply(f"w{number}", f"w{number}", 1, NAMES[:20], ())
    router = FleetRouter(fleet, index)
    for num_blocks in (5, 20, 40):
        request = RoutedRequest(f"r{num_blocks}", 16 * num_blocks, 16, 1, {})
        held = index.matches(NAMES[:num_blocks])
        chosen = router.route(request, NAMES[:num_blocks], Placement.REMOTE, LinkMatrix(), 0.0).chosen
        assert chosen.prefill is not None
        cost = chosen.prefill.cost
        starts = [
            seat.queue_s + cost.prefill_s(max(1, request.num_tokens - 16 * held.get(seat.worker_id, 0)))
            for seat in fleet.seats.values()
            if seat.is_prefill
        ]
        assert abs(chosen.queue_s + chosen.prefill_s - min(starts)) < 1e-9
        assert chosen.decode.running == min(seat.running for seat in fleet.seats.values() if not seat.is_prefill)


def test_a_neighbour_of_the_holder_gets_its_blocks_rather_than_wait_for_it() -> None:
    """Three on the holder's host, one of them idle; elsewhere all are idle and know nothing."""
    workers = [
        WorkerView(f"w{number}", f"w{number}", Role.PREFILL, "h:1", "same", host_id, queued_tokens=queued)
        for number, (host_id, queued) in enumerate(
            [("a", 9000), ("a", 5000), ("a", 100), ("b", 0), ("c", 0), ("d", 0), ("e", 0), ("f", 0), ("g", 0)]
        )
    ]
    decoders = [
        WorkerView(f"d{number}", f"d{number}", Role.DECODE, "h:1", "same", "abcdefg"[number]) for number in range(7)
    ]
    index = PrefixIndex()
    index.apply("w0", "w0", 1, NAMES[:38], ())
    fleet = Fleet()
    for worker in (*workers, *decoders):
        fleet.put(worker)
    request = RoutedRequest("r", 16 * 40, 16, 1 << 20, {}, fetch=FetchPolicy())
    for router in (FleetRouter(fleet, index, few_pairs=0), FleetRouter(fleet, index, few_pairs=1000)):
        chosen = router.route(request, NAMES, Placement.REMOTE, LinkMatrix(), 0.0).chosen
        assert chosen.prefill is not None
        assert chosen.prefill.worker_id == "w2"
        assert chosen.fetch is not None
        assert (chosen.fetch.holder_id, chosen.fetch.num_blocks) == ("w0", 38)


@settings(max_examples=60, deadline=None)
@given(clusters(), st.sampled_from([Placement.LOCAL, Placement.AUTO]), st.data())
def test_what_targets_change_is_priced_exactly_too(cluster: Cluster, placement: Placement, data: st.DataObject) -> None:
    targets = st.sampled_from([None, 0.012, 0.02, 0.1, 1.0])
    cluster.request = dataclasses.replace(
        cluster.request, fetch=None, ttft_target_s=data.draw(targets), tpot_target_s=data.draw(targets)
    )
    cluster.workers = [
        worker
        if worker.role is Role.PREFILL
        else dataclasses.replace(
            worker, queued_tokens=data.draw(st.sampled_from([0, 300])), tightest_tpot_s=data.draw(targets)
        )
        for worker in cluster.workers
    ]
    names = NAMES[: -(-cluster.request.num_tokens // 16)]
    quick = cluster.quick(placement).route(cluster.request, names, placement, cluster.links, 0.0).chosen
    known = dataclasses.replace(cluster.request, cached_blocks=cluster.index.matches(names))
    if quick.prefill is None:
        exact = price_local(known, quick.decode, cluster.workers, cluster.links, 0.0)
    else:
        exact = price_remote(known, quick.prefill, quick.decode, cluster.workers, cluster.links, 0.0)
    assert exact.num_misses == quick.num_misses
    assert abs(exact.ttft_s - quick.ttft_s) < 1e-9
    assert abs(exact.price_s - quick.price_s) < 1e-9


@settings(max_examples=100, deadline=None)
@given(clusters(), st.data())
def test_where_ways_to_answer_are_compared_each_is_priced_exactly_too(cluster: Cluster, data: st.DataObject) -> None:
    targets = st.sampled_from([None, 0.012, 0.02, 0.1, 1.0])
    cluster.request = dataclasses.replace(
        cluster.request,
        ttft_target_s=data.draw(targets),
        tpot_target_s=data.draw(targets),
        answer=data.draw(st.sampled_from([Answer(1, 1), Answer(4, 4), Answer(20, 300)])),
    )
    for at, worker in enumerate(cluster.workers):
        running = data.draw(st.integers(0, 3))
        cluster.workers[at] = dataclasses.replace(
            worker,
            running=running,
            queued_tokens=data.draw(st.sampled_from([0, 300])),
            tightest_tpot_s=data.draw(targets),
            answers_whole=worker.role is Role.PREFILL and data.draw(st.integers(0, 3)) > 0,
            gets_handoffs=data.draw(st.booleans()),
            cost=dataclasses.replace(worker.cost, gap_s=data.draw(st.sampled_from([None, 0.015, 0.06]))),
        )
    names = NAMES[: -(-cluster.request.num_tokens // 16)]
    decision = cluster.quick(Placement.AUTO).route(cluster.request, names, Placement.AUTO, cluster.links, 0.0)
    known = dataclasses.replace(cluster.request, cached_blocks=cluster.index.matches(names))
    for quick in (decision.chosen, decision.runner_up):
        if quick is None or quick.fetch is not None:
            continue
        unfetched = dataclasses.replace(known, fetch=None)
        if quick.decode.role is Role.PREFILL:
            exact = price_whole(unfetched, quick.decode, cluster.workers, cluster.links, 0.0)
        elif quick.prefill is None:
            exact = price_local(unfetched, quick.decode, cluster.workers, cluster.links, 0.0)
        else:
            exact = price_remote(unfetched, quick.prefill, quick.decode, cluster.workers, cluster.links, 0.0)
        assert (exact.mode, exact.num_misses) == (quick.mode, quick.num_misses)
        assert abs(exact.slowness - quick.slowness) < 1e-9
        assert abs(exact.ttft_s - quick.ttft_s) < 1e-9
        assert abs(exact.price_s - quick.price_s) < 1e-9


@pytest.mark.parametrize("num_tokens", [100, 600])
def test_in_a_large_cluster_too_a_short_answer_is_given_whole_where_that_is_cheapest(num_tokens: int) -> None:
    draw = random.Random(num_tokens)
    fleet = Fleet()
    workers = [
        WorkerView(
            f"w{number}",
            f"w{number}",
            Role.DECODE if number % 2 else Role.PREFILL,
            "h:1",
            "same",
            queued_tokens=draw.randrange(3000, 6000) if number % 2 else draw.randrange(1, 4000),
            answers_whole=number % 2 == 0,
            cost=WorkerCost(gap_s=0.3),
        )
        for number in range(100)
    ]
    for worker in workers:
        fleet.put(worker)
    request = RoutedRequest("r", num_tokens, 16, 1, {}, tpot_target_s=0.1, answer=Answer(2, 2))
    quick = FleetRouter(fleet, PrefixIndex()).route(request, NAMES[:6], Placement.AUTO, LinkMatrix(), 0.0)
    whole = route(request, workers, Placement.AUTO, LinkMatrix(), 0.0)
    assert quick.chosen.decode.role is Role.PREFILL
    assert abs(quick.chosen.price_s - whole.chosen.price_s) < 1e-9
    assert quick.reason.startswith("a prefill worker answers it whole")


@settings(max_examples=30, deadline=None)
@given(clusters(), st.data())
def test_workers_that_failed_a_request_are_not_among_the_few(cluster: Cluster, data: st.DataObject) -> None:
    excluded = data.draw(st.sets(st.sampled_from([worker.incarnation for worker in cluster.workers])))
    preferred = data.draw(st.sets(st.sampled_from([worker.incarnation for worker in cluster.workers]), max_size=1))
    request = dataclasses.replace(cluster.request, excluded=excluded, preferred=preferred)
    names = NAMES[: -(-request.num_tokens // 16)]
    known = dataclasses.replace(request, cached_blocks=cluster.index.matches(names))
    router = cluster.quick(Placement.REMOTE)
    try:
        whole = route(known, cluster.workers, Placement.REMOTE, cluster.links, 0.0)
    except BatonError:
        with pytest.raises(BatonError, match="no usable decode worker"):
            router.route(request, names, Placement.REMOTE, cluster.links, 0.0)
        return
    chosen = router.route(request, names, Placement.REMOTE, cluster.links, 0.0).chosen
    assert not {worker.incarnation for worker in chosen.workers} & excluded
    assert (chosen.prefill is None) == (whole.chosen.prefill is None)
    wished = {worker.incarnation for worker in whole.chosen.workers} & preferred
    assert wished <= {worker.incarnation for worker in chosen.workers}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3000), st.integers(0, 30), st.booleans()), max_size=60))
def test_the_head_of_a_lane_is_never_more_loaded_than_what_follows(
    changes: list[tuple[int, int, int, bool]],
) -> None:
    fleet = Fleet()
    for number, queued_tokens, running, is_gone in changes:
        worker_id = f"w{number}"
        role = Role.PREFILL if number % 2 else Role.DECODE
        if is_gone:
            fleet.remove(worker_id)
        elif worker_id in fleet.seats and queued_tokens % 2:
            fleet.set_load(worker_id, queued_tokens, running)
        else:
            fleet.put(WorkerView(worker_id, "i", role, "h:1", "same", "host", queued_tokens, running))
        assert len(fleet.views()) == len(fleet) == len(fleet.seats)
        assert fleet.num_prefill == sum(seat.is_prefill for seat in fleet.seats.values())
        for lane in (*fleet.prefill_lanes, *fleet.decode_lanes):
            loads = sorted(seat.load_s for seat in lane)
            assert lane.first(7).load_s == loads[0]
            assert [seat.load_s for seat in lane.head(3)] == loads[:3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 40))
def test_levels_tell_what_matches_tell(depths: list[int], num_blocks: int) -> None:
    index = PrefixIndex()
    for number, depth in enumerate(depths):
        index.apply(f"w{number}", "i", 1, NAMES[:depth], ())
    names = NAMES[:num_blocks]
    matches = index.matches(names)
    assert matches == {f"w{number}": min(depth, num_blocks) for number, depth in enumerate(depths) if depth}
    levels = index.levels(names, 99)
    assert {worker: level.num_blocks for level in levels for worker in index.holders(level.holders)} == matches
    assert [level.num_blocks for level in levels] == sorted(set(matches.values()), reverse=True)
    assert index.levels(names, 2) == levels[:2]
    below, rest = num_blocks + 1, index.holding(names, 1)
    for level in levels:
        assert index.deepest_of(names, rest, below) == level
        below, rest = level.num_blocks, rest & ~level.holders
    assert not rest
    assert index.deepest(names) == (*(levels[0] if levels else (0, 0)), index.holding(names, 1))
    for worker_id, bit in index.bits.items():
        assert index.depth(names, bit) == matches.get(worker_id, 0)
