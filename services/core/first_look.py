"""The choice that most requests of a large cluster get: the worker that holds the longest known prefix or the least loaded one,
and the decode worker that suits it. A few microseconds; whatever is not plain is left to a second look (``quick_route``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from baton.services.core.candidates import Candidate, Mode, Role, RoutedRequest, RoutingDecision
from baton.services.core.cost_model import OTHER_HOST, SAME_HOST
from baton.services.core.fetch import FetchMode, FetchPlan
from baton.services.core.fleet import Fleet, Seat
from baton.services.core.links import LinkView
from baton.services.core.prefix_index import PrefixIndex

_MAX_HOLDERS = 4
_REASON = "cheapest of the prefill/decode pairs that are likely to be"
_make = Candidate._make  # a fraction of the time of a call with names

_Start: TypeAlias = tuple[float, int, Seat, float, FetchPlan | None]  # start_s, order, who prefills, prefill_s, fetch
# price_s, order, start, who decodes, transfer_s, wait_s, num_cached
_Pair: TypeAlias = tuple[float, int, _Start, Seat, float, float, int]


def first_look(
    fleet: Fleet, index: PrefixIndex, request: RoutedRequest, block_names: Sequence[bytes], links: LinkView
) -> RoutingDecision | None:
    """The cheapest pair for a request that goes through the prefill pool. None: it takes a second look to tell."""
    num_tokens, size = request.num_tokens, request.block_size
    holder: Seat | None = None  # the least loaded prefill worker with the longest prefix
    other_holder: Seat | None = None  # the decode worker
    held, holders = index.deepest(block_names) if block_names else (0, 0)
    if holders:
        if holders.bit_count() > _MAX_HOLDERS:
            return None
        seats, worker_ids = fleet.seats, index.worker_ids
        while holders:
            last = holders & -holders
            holders ^= last
            seat = seats.get(worker_ids[last.bit_length() - 1])
            if seat is None:
                continue
            if seat.is_prefill:
                if holder is None or seat.load_s < holder.load_s:
                    holder = seat
            elif other_holder is None or seat.load_s < other_holder.load_s:
                other_holder = seat

    starts: list[_Start] = []
    quickest_s = 1e9
    if holder is not None:
        num_left = num_tokens - held * size
        prefill_s = holder.prefill_s(num_left if num_left > 0 else 1)
        quickest_s = holder.queue_s + prefill_s - holder.curiosity * prefill_s
        starts.append((quickest_s, 0, holder, prefill_s, None))
    num_left = num_tokens - held * size
    for lane in fleet.prefill_lanes:
        seat = lane.first(request.request_id)
        if seat is holder:
            continue
        queue_s, num_cached, fetch = seat.queue_s, 0, None
        # With all blocks that there are it might be quicker than the holder; else it is at most the runner-up.
        if held and queue_s + seat.prefill_s(num_left if num_left > 0 else 1) < quickest_s:
            num_cached = _depth(index, block_names, seat)
            fetch = _fetch(request, links, holder or other_holder, seat, held, num_cached)
        if fetch is None:
            num_uncached = num_tokens - num_cached * size
            prefill_s = seat.prefill_s(num_uncached if num_uncached > 0 else 1)
        else:
            queue_s += fetch.fetch_s
            prefill_s = seat.prefill_s(num_tokens - fetch.num_blocks * size)
        start_s = queue_s + prefill_s - seat.curiosity * prefill_s
        starts.append((start_s, len(starts), seat, prefill_s, fetch))
    if not starts:
        return None
    starts.sort()

    start = starts[0]
    tails = [lane.first(request.request_id) for lane in fleet.decode_lanes]
    if other_holder is not None and other_holder not in tails:
        tails.append(other_holder)
    near = fleet.neighbour(start[2])
    if near is not None and near not in tails:
        tails.append(near)
    pairs: list[_Pair] = []
    for seat in tails:
        num_cached = held if seat is other_holder else held and _depth(index, block_names, seat)
        pair = _pair(request, links, start, seat, num_cached, len(pairs))
        if pair is not None:
            pairs.append(pair)
    if not pairs:
        return None
    pairs.sort()
    _, _, _, decode, _, wait_s, num_cached = best = pairs[0]
    if len(starts) > 1:
        pair = _pair(request, links, starts[1], decode, num_cached, len(pairs))
        if pair is not None:
            pairs.append(pair)
            pairs[1:] = sorted(pairs[1:])
    if request.ttft_target_s is not None:
        ttft_s = start[0] + start[2].curiosity * start[3] + best[4] + wait_s
        if ttft_s > request.ttft_target_s:
            return None
    if request.tpot_target_s is not None and decode.view.cost.step_s(decode.running + 1) > request.tpot_target_s:
        return None
    other_way = _local(request, decode, num_cached, wait_s)
    runner_up = _remote(pairs[1]) if len(pairs) > 1 else other_way
    return RoutingDecision(_remote(best), runner_up, _REASON, other_way)


def _depth(index: PrefixIndex, block_names: Sequence[bytes], seat: Seat) -> int:
    bit = index.bits.get(seat.worker_id)
    return index.depth(block_names, bit) if bit else 0


def _pair(
    request: RoutedRequest, links: LinkView, start: _Start, decode: Seat, num_cached: int, order: int
) -> _Pair | None:
    prefill = start[2]
    view = decode.view
    if decode.lane not in prefill.lane.peers or view.role is not Role.DECODE:
        return None
    link = links.row(prefill.incarnation).get(decode.incarnation)
    cost = None
    if link is not None:
        if not link.is_calm:
            return None
        cost = link.price
    if cost is None:
        cost = SAME_HOST if prefill.host_id and prefill.host_id == decode.host_id else OTHER_HOST
    size, num_tokens = request.block_size, request.num_tokens
    num_blocks = -(-num_tokens // size)
    if num_blocks > view.available_blocks:
        return None
    num_sent = num_blocks - num_cached
    max_num_tokens = prefill.view.max_num_batched_tokens
    if num_sent * size > max_num_tokens and num_tokens > max_num_tokens:
        num_sent = -(-max_num_tokens // size)
    transfer_s = cost.fixed_s + num_sent * request.block_bytes / cost.bytes_per_s
    return start[0] + decode.load_s + transfer_s, order, start, decode, transfer_s, decode.wait_s, num_cached


def _fetch(
    request: RoutedRequest, links: LinkView, holder: Seat | None, needer: Seat, held: int, num_cached: int
) -> FetchPlan | None:
    """See ``fetch.plan_fetch``; there is one to ask."""
    policy = request.fetch
    if holder is None or policy is None or policy.mode is FetchMode.OFF or needer.lane not in holder.lane.peers:
        return None
    num_useful = (request.num_tokens - 1) // request.block_size
    num_blocks = held if held < num_useful else num_useful
    num_new = num_blocks - num_cached
    compute_s = num_new * request.block_size * needer.token_s
    if num_new <= 0 or (policy.mode is FetchMode.AUTO and compute_s <= policy.round_trips_s):
        return None
    link = links.row(holder.incarnation).get(needer.incarnation)
    if link is not None and not link.is_calm:
        return None
    if link is not None and link.price is not None:
        cost = link.price
    else:
        cost = SAME_HOST if holder.host_id and holder.host_id == needer.host_id else OTHER_HOST
    fetch_s = policy.round_trips_s + cost.fixed_s + num_new * request.block_bytes / cost.bytes_per_s
    if fetch_s >= compute_s and policy.mode is FetchMode.AUTO:
        return None
    return FetchPlan(holder.worker_id, num_blocks, num_new, fetch_s, compute_s, policy.min_patience_s + compute_s)


def _remote(pair: _Pair) -> Candidate:
    _, _, (_, _, prefill, prefill_s, fetch), decode, transfer_s, wait_s, _ = pair
    interference_s = decode.crowding_s + decode.queue_s
    worth_s = prefill.curiosity * prefill_s
    return _make(
        (
            Mode.REMOTE,
            decode.view,
            prefill.view,
            prefill.queue_s,
            prefill_s,
            transfer_s,
            wait_s,
            interference_s,
            fetch,
            0,
            worth_s,
        )
    )


def _local(request: RoutedRequest, decode: Seat, num_cached: int, wait_s: float) -> Candidate:
    """What the choice is compared with: the decode worker computes the prompt itself."""
    num_left = request.num_tokens - num_cached * request.block_size
    prefill_s = decode.prefill_s(num_left if num_left > 0 else 1)
    stall_s = prefill_s * decode.running + decode.crowding_s
    worth_s = decode.curiosity * prefill_s
    return _make((Mode.LOCAL, decode.view, None, decode.queue_s, prefill_s, 0.0, wait_s, stall_s, None, 0, worth_s))
