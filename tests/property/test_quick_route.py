"""A choice among few workers costs what the router's arithmetic says, and little more than the cheapest of all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.services.core.cost_model import OTHER_HOST, WorkerCost
from baton.services.core.errors import BatonError
from baton.services.core.fetch import FetchMode, FetchPolicy
from baton.services.core.fleet import LANE_SPREAD, Fleet
from baton.services.core.links import LinkMatrix, PairKey, ProbeResult
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.pricing import price_local, price_remote
from baton.services.core.quick_route import FleetRouter
from baton.services.core.router import Placement, Role, RoutedRequest, WorkerView, route

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

    # The dearest link instead of the cheapest, for the handoff and for a fetch, a slower worker of the same lane,
    num_bytes = len(names) * BLOCK_BYTES
    links_s = OTHER_HOST.transfer_s(num_bytes)
    # and what is given for curiosity, which the order of a lane does not know.
    lane_s = (LANE_SPREAD - 1 + 0.2) * (quick.prefill_s + quick.queue_s) * (1 + quick.decode.running)
    assert quick.price_s <= whole.price_s + 2 * links_s + lane_s + 1e-6


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
            loads = sorted(seat.load_s for seat in lane.seats)
            assert lane.first("r").load_s == loads[0]
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
    assert index.deepest(names) == (levels[0] if levels else (0, 0))
    for worker_id, bit in index.bits.items():
        assert index.depth(names, bit) == matches.get(worker_id, 0)
