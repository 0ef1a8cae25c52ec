"""The cheapest way among a few workers: the arithmetic of ``pricing`` without its objects, since each request of a large
cluster pays for it. ``tests/property/test_quick_route.py`` holds it to ``router.route``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from baton.services.core.candidates import Candidate, Mode, Placement, Role, RoutedRequest, RoutingDecision
from baton.services.core.cost_model import OTHER_HOST, SAME_HOST, LinkCost
from baton.services.core.fetch import FetchMode, FetchPlan, FetchPolicy
from baton.services.core.fleet import Seat
from baton.services.core.links import Link, LinkState, LinkView, PairKey, Standing
from baton.services.core.pricing import (
    beside,
    beside_answers,
    blocks_wait_s,
    handoff_gap_s,
    handoff_s,
    may_answer,
    num_missed,
    stalls_s,
    whole_answer,
)
from baton.services.core.router import explain

# More than any price: a way that meets its targets comes before one that does not.
_MISS_S = 1e6
_MAX_FETCH_HOLDERS = 3

# Plain tuples: they are made quickly, and sort by their first fields.
_Fetch: TypeAlias = tuple[float, Seat, int, int, float]  # fetch_s, holder, num_blocks, num_new, compute_s
_Head: TypeAlias = tuple[float, int, Seat, float, _Fetch | None]  # start_s, order, who prefills, prefill_s, fetch
_Tail: TypeAlias = tuple[float, int, Seat, float, int]  # load_s, order, who decodes, wait_s, num_cached
# rank, order, head, tail, prefill_s, transfer_s, stall_s, num_misses, fetch. Without a head whoever decodes computes the
# prompt; of a prefill worker that answers whole, prefill_s is what it takes alone.
_Way: TypeAlias = tuple[float, int, _Head | None, _Tail, float, float, float, int, _Fetch | None]


class Few(NamedTuple):
    """Workers worth pricing, and how many of the prompt's first blocks each holds."""

    prefill: list[Seat]
    decode: list[Seat]
    cached: dict[str, int]

    def add(self, seat: Seat, num_cached: int) -> None:
        """One that is not among them yet."""
        self.cached[seat.worker_id] = num_cached
        (self.prefill if seat.is_prefill else self.decode).append(seat)


def cheapest(
    request: RoutedRequest, few: Few, placement: Placement, links: LinkView, now: float
) -> RoutingDecision | None:
    """What ``router.route`` would choose among them. None: it has to look itself."""
    if not few.decode:
        return None
    tails = _tails(request, few)
    fetches = _Fetches(request, few, links, now)
    remote = _remote(request, few, tails, fetches, links)
    if remote:
        _, _, head, tail, *_ = remote[0]
        assert head is not None
        link = links.row(head[2].incarnation).get(tail[2].incarnation)
        if link is not None and not link.is_calm:
            pair = PairKey(head[2].incarnation, tail[2].incarnation)
            if links.standing(pair, now) is not Standing.FINE:
                return None
    elif placement is Placement.REMOTE and few.prefill:
        return None  # others may pair
    is_only_compared = placement is Placement.REMOTE and bool(remote)
    local = _local(request, tails[:1] if is_only_compared else tails, fetches)
    if placement is Placement.AUTO:
        local = sorted(local + _whole(request, few, fetches))[:2]
    if placement is Placement.REMOTE:
        ranked = remote + local
    elif placement is Placement.LOCAL:
        ranked = local + remote
    else:
        ranked = sorted(remote + local)
    chosen = _candidate(ranked[0], request)
    runner_up = _candidate(ranked[1], request) if len(ranked) > 1 else None
    others = remote if chosen.prefill is None else local
    if not others:
        other_way = None
    elif runner_up is not None and ranked[1] is others[0]:
        other_way = runner_up
    else:
        other_way = _candidate(others[0], request)
    reason = explain(chosen, placement, len(few.prefill) * len(tails), len(tails))
    return RoutingDecision(chosen, runner_up, reason, other_way)


def _candidate(way: _Way, request: RoutedRequest) -> Candidate:
    _, _, head, tail, prefill_s, transfer_s, stall_s, num_misses, fetch = way
    decode = tail[2]
    plan = _plan(request, fetch)
    if head is not None:
        prefill = head[2]
        slowness = beside_answers(request, prefill.view, prefill.running)[0]
        return Candidate(
            Mode.REMOTE,
            decode.view,
            prefill.view,
            slowness * prefill.queue_s,
            prefill_s,
            transfer_s,
            tail[3],
            decode.crowding_s + decode.queue_s + stall_s,
            plan,
            num_misses,
            prefill.curiosity * prefill_s,
            slowness,
        )
    if decode.is_prefill:
        return whole_answer(request, decode.current_view(), prefill_s, plan)
    mode = Mode.LOCAL if decode.view.role is Role.DECODE else Mode.COLOCATED
    interference_s = decode.crowding_s + stall_s
    worth_s = decode.curiosity * prefill_s
    slowness = beside(request, decode.view, decode.running)[0]
    queue_s = slowness * decode.queue_s
    return Candidate(
        mode, decode.view, None, queue_s, prefill_s, 0.0, tail[3], interference_s, plan, num_misses, worth_s, slowness
    )


def _plan(request: RoutedRequest, fetch: _Fetch | None) -> FetchPlan | None:
    if fetch is None or request.fetch is None:
        return None
    fetch_s, holder, num_blocks, num_new, compute_s = fetch
    patience_s = request.fetch.min_patience_s + compute_s
    return FetchPlan(holder.worker_id, num_blocks, num_new, fetch_s, compute_s, patience_s)


def _tails(request: RoutedRequest, few: Few) -> list[_Tail]:
    num_blocks = -(-request.num_tokens // request.block_size)
    cached = few.cached
    tails: list[_Tail] = []
    for order, seat in enumerate(few.decode):
        if seat.view.available_blocks >= num_blocks:
            tails.append((seat.load_s, order, seat, seat.wait_s, cached[seat.worker_id]))
        else:
            lacking_s = blocks_wait_s(seat.view, num_blocks)
            tails.append((seat.load_s + lacking_s, order, seat, seat.wait_s + lacking_s, cached[seat.worker_id]))
    tails.sort()
    return tails


def _remote(request: RoutedRequest, few: Few, tails: Sequence[_Tail], fetches: _Fetches, links: LinkView) -> list[_Way]:
    """The two cheapest pairs."""
    block_size, block_bytes = request.block_size, request.block_bytes
    num_blocks = -(-request.num_tokens // block_size)
    has_targets = request.ttft_target_s is not None or request.tpot_target_s is not None
    ways: list[_Way] = []
    limit = math.inf  # of the second
    for head in fetches.heads(few.prefill):
        start_s, _, prefill, prefill_s, fetch = head
        if start_s >= limit:
            break
        slowness, num_disturbed = beside_answers(request, prefill.view, prefill.running)
        peers, host_id, row = prefill.lane.peers, prefill.host_id, links.row(prefill.incarnation)
        num_last = num_blocks
        if request.num_tokens > prefill.view.max_num_batched_tokens:
            num_last = -(-prefill.view.max_num_batched_tokens // block_size)
        for tail in tails:
            rank = start_s + tail[0]
            if rank >= limit:
                break
            decode = tail[2]
            if decode.lane not in peers or decode.view.role is not Role.DECODE:
                continue
            link = row.get(decode.incarnation)
            if link is None or link.price is None:
                cost = SAME_HOST if host_id and host_id == decode.host_id else OTHER_HOST
            else:
                cost = link.price
            if link is not None and link.state is LinkState.FAILED:
                continue
            num_sent = num_blocks - tail[4]
            if num_sent > num_last:
                num_sent = num_last
            transfer_s = cost.fixed_s + num_sent * block_bytes / cost.bytes_per_s
            rank += transfer_s
            num_misses, gap_s, waits_s = num_disturbed, None, 0.0
            if request.answer is not None:
                decoder = decode.current_view()
                gap_s = handoff_gap_s(decoder, decoder.running, transfer_s)
                waits_s = handoff_s(request, prefill.current_view(), decoder, prefill_s / slowness, gap_s)
            if has_targets:
                ttft_s = start_s + prefill.curiosity * prefill_s + transfer_s + tail[3]
                num_misses += num_missed(request, ttft_s, decode.view, decode.running, gap_s)
            rank += waits_s + num_misses * _MISS_S
            if rank < limit:
                ways.append((rank, len(ways), head, tail, prefill_s, transfer_s, waits_s, num_misses, fetch))
                if len(ways) > 1:
                    ways.sort()
                    del ways[2:]
                    limit = ways[1][0]
    return ways


def _local(request: RoutedRequest, tails: Sequence[_Tail], fetches: _Fetches) -> list[_Way]:
    """The two cheapest that prefill themselves."""
    has_targets = request.ttft_target_s is not None or request.tpot_target_s is not None
    ways: list[_Way] = []
    for tail in tails:
        load_s, order, decode, wait_s, _ = tail
        prefill_s, fetch = fetches.prefill_s(decode, math.inf)
        fetch_s = 0.0 if fetch is None else fetch[0]
        stall_s, num_misses, queue_s = stalls_s(decode.view, decode.running, prefill_s), 0, decode.queue_s
        if has_targets or decode.view.tightest_tpot_s is not None:
            slowness, num_misses = beside(request, decode.view, decode.running)
            load_s += (slowness - 1.0) * queue_s
            queue_s, prefill_s = slowness * queue_s, slowness * prefill_s
        if has_targets:
            ttft_s = queue_s + fetch_s + prefill_s + wait_s
            num_misses += num_missed(request, ttft_s, decode.view, decode.running)
        rank = load_s + fetch_s + prefill_s + stall_s - decode.curiosity * prefill_s + num_misses * _MISS_S
        ways.append((rank, order, None, tail, prefill_s, 0.0, stall_s, num_misses, fetch))
    if len(ways) > 1:
        ways.sort()
        del ways[2:]
    return ways


def _whole(request: RoutedRequest, few: Few, fetches: _Fetches) -> list[_Way]:
    """The prefill workers that could answer it themselves. Few enough to be priced one by one."""
    ways: list[_Way] = []
    for seat in few.prefill:
        if may_answer(request, seat.view, seat.running):
            own_s, fetch = fetches.prefill_s(seat, math.inf)
            candidate = whole_answer(request, seat.current_view(), own_s, _plan(request, fetch))
            rank = candidate.price_s + candidate.num_misses * _MISS_S
            tail = (seat.load_s, len(ways), seat, 0.0, few.cached[seat.worker_id])
            ways.append((rank, len(few.decode) + len(ways), None, tail, own_s, 0.0, 0.0, candidate.num_misses, fetch))
    return ways


class _Fetches:
    """What those who prefill get from others first, and how long they compute then."""

    __slots__ = ("_cached", "_holders", "_links", "_most", "_now", "_policy", "_request")

    def __init__(self, request: RoutedRequest, few: Few, links: LinkView, now: float) -> None:
        self._request = request
        self._cached = few.cached
        self._links = links
        self._now = now
        self._most = 0  # blocks that somebody holds and a fetch could bring
        self._policy = policy = request.fetch
        self._holders: list[Seat] = []
        if policy is not None and policy.mode is not FetchMode.OFF:
            most = max(few.cached.values())
            if most:
                num_useful = (request.num_tokens - 1) // request.block_size
                self._most = most if most < num_useful else num_useful
                # A holder that has less, but is nearer, may be quicker to ask; rarely by much.
                holders = [seat for seat in few.prefill + few.decode if few.cached[seat.worker_id] == most]
                self._holders = holders[:_MAX_FETCH_HOLDERS]

    def heads(self, prefill: Sequence[Seat]) -> list[_Head]:
        """The prefill workers, quickest first."""
        heads: list[_Head] = []
        quickest_s = math.inf
        for seat in prefill:
            queue_s = seat.queue_s
            prefill_s, fetch = self.prefill_s(seat, quickest_s - queue_s)
            if seat.running:
                slowness = beside_answers(self._request, seat.view, seat.running)[0]
                queue_s, prefill_s = slowness * queue_s, slowness * prefill_s
            start_s = queue_s + prefill_s if fetch is None else queue_s + fetch[0] + prefill_s
            start_s -= seat.curiosity * prefill_s
            heads.append((start_s, len(heads), seat, prefill_s, fetch))
            if start_s < quickest_s:
                quickest_s = start_s
        heads.sort()
        return heads

    def prefill_s(self, seat: Seat, useful_s: float) -> tuple[float, _Fetch | None]:
        """``useful_s``: what takes longer is not chosen anyway."""
        request, policy, most = self._request, self._policy, self._most
        block_size = request.block_size
        num_blocks = self._cached[seat.worker_id]
        fetch: _Fetch | None = None
        if num_blocks < most:
            assert policy is not None
            saved_s = (most - num_blocks) * block_size * seat.token_s
            at_best_s = policy.round_trips_s + (request.num_tokens - most * block_size) * seat.token_s
            if (policy.round_trips_s < saved_s and at_best_s < useful_s) or policy.mode is FetchMode.ALWAYS:
                fetch = self._plan(seat, most, most - num_blocks, saved_s, policy)
                if fetch is not None:
                    num_blocks = most
        num_uncached = request.num_tokens - num_blocks * block_size
        return seat.prefill_s(num_uncached if num_uncached > 0 else 1), fetch

    def _plan(
        self, needer: Seat, num_blocks: int, num_new: int, compute_s: float, policy: FetchPolicy
    ) -> _Fetch | None:
        """See ``fetch.plan_fetch``."""
        best: _Fetch | None = None
        num_bytes = num_new * self._request.block_bytes
        for holder in self._holders:
            if needer.lane not in holder.lane.peers or holder is needer:
                continue
            link = self._links.row(holder.incarnation).get(needer.incarnation)
            is_calm = link is None or link.is_calm
            if not is_calm and not self._links.may_fetch(PairKey(holder.incarnation, needer.incarnation), self._now):
                continue
            cost = _cost(link, holder, needer)
            fetch_s = policy.round_trips_s + cost.fixed_s + num_bytes / cost.bytes_per_s
            if fetch_s >= compute_s and policy.mode is FetchMode.AUTO:
                continue
            if best is None or fetch_s < best[0]:
                best = (fetch_s, holder, num_blocks, num_new, compute_s)
        return best


def _cost(link: Link | None, source: Seat, target: Seat) -> LinkCost:
    if link is not None and link.price is not None:
        return link.price
    return SAME_HOST if source.host_id and source.host_id == target.host_id else OTHER_HOST
