"""The choice that most requests of a large cluster get: where the prompt is computed soonest, and the decode worker that suits
it. A few microseconds; whatever is not plain is left to a second look (``quick_route``).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from baton.services.core.candidates import Candidate, Mode, RoutedRequest, RoutingDecision
from baton.services.core.cost_model import OTHER_HOST, SAME_HOST
from baton.services.core.fleet import Fleet, Seat
from baton.services.core.holders import Holders
from baton.services.core.links import Link, LinkView
from baton.services.core.prefix_index import NOBODY, PrefixIndex
from baton.services.core.soonest import NEVER_S, Soonest, Start

_REASON = "cheapest of the prefill/decode pairs that are likely to be"
# A fraction of the time of a call with names.
_make, _decide = Candidate._make, RoutingDecision._make

_Pair: TypeAlias = tuple[float, Start, Seat, float, int]  # price_s, start, who decodes, transfer_s, num_cached


def first_look(
    fleet: Fleet,
    index: PrefixIndex,
    holders: Holders,
    request: RoutedRequest,
    block_names: Sequence[bytes],
    links: LinkView,
) -> RoutingDecision | None:
    """The cheapest pair for a request that goes through the prefill pool. None: it takes a second look to tell."""
    num_tokens, size = request.num_tokens, request.block_size
    spread = zlib.crc32(request.request_id.encode())
    held = index.deepest(block_names) if block_names else NOBODY
    num_held, bits = held
    prefill: Sequence[Seat] = ()
    others: Sequence[Seat] = ()
    if bits:
        prefill, others = holders.among(bits)
    num_left = num_tokens - num_held * size
    if num_left < 1:
        num_left = 1

    start: Start | None = None
    second: Start | None = None
    start_s = NEVER_S
    best: Seat | None = None
    for seat in prefill:
        if best is None or seat.queue_s < best.queue_s or seat.lane is not best.lane:
            prefill_s = seat.prefill_s(num_left)
            at_s = seat.queue_s + prefill_s - seat.curiosity * prefill_s
            if at_s < start_s:
                start, start_s, best = (at_s, seat, prefill_s, None), at_s, seat
    firsts = [lane.first(spread) for lane in fleet.prefill_lanes]
    for seat in firsts:
        if seat is best:
            continue
        prefill_s = seat.prefill_s(num_left)
        at_s = seat.queue_s + prefill_s - seat.curiosity * prefill_s
        if num_held:
            if at_s < start_s:  # with all blocks that there are
                soonest = Soonest(fleet, index, request, block_names, links)
                soonest.search(start, firsts, held, holders)
                start, second = soonest.best_two()
                break
            if seat not in prefill:
                prefill_s = seat.prefill_s(num_tokens)
                at_s = seat.queue_s + prefill_s - seat.curiosity * prefill_s
        if at_s < start_s:
            second, start, start_s, best = start, (at_s, seat, prefill_s, None), at_s, seat
        elif second is None or at_s < second[0]:
            second = (at_s, seat, prefill_s, None)
    if start is None:
        return None

    decode = _decode(fleet, index, request, block_names, links, start, others, num_held, spread)
    if decode is None:
        return None
    chosen, other = decode
    _, _, seat, transfer_s, num_cached = chosen
    if second is not None:
        pair = _pair(request, links.row(second[1].incarnation), second, seat, num_cached)
        if pair is not None:
            if pair[0] < chosen[0]:  # its link is that much quicker
                chosen, other = pair, chosen
                start, transfer_s = second, pair[3]
            elif other is None or pair[0] < other[0]:
                other = pair
    if request.ttft_target_s is not None:
        ttft_s = start[0] + start[1].curiosity * start[2] + transfer_s + seat.wait_s
        if ttft_s > request.ttft_target_s:
            return None
    if request.tpot_target_s is not None and seat.view.cost.step_s(seat.running + 1) > request.tpot_target_s:
        return None
    other_way = _local(request, seat, num_cached)
    return _decide((_remote(chosen), other_way if other is None else _remote(other), _REASON, other_way))


def _decode(
    fleet: Fleet,
    index: PrefixIndex,
    request: RoutedRequest,
    block_names: Sequence[bytes],
    links: LinkView,
    start: Start,
    holders: Sequence[Seat],
    num_held: int,
    spread: int,
) -> tuple[_Pair, _Pair | None] | None:
    """The best for the start, and the second best: of the least loaded ones, those who hold most of the prompt, and those on
    the same host."""
    tails = [lane.first(spread) for lane in fleet.decode_lanes]
    holder: Seat | None = None
    for seat in holders:
        if holder is None or seat.load_s < holder.load_s:
            holder = seat
    if holder is not None and holder not in tails:
        tails.append(holder)
    near = fleet.neighbour(start[1])
    if near is not None and near not in tails:
        tails.append(near)
    row = links.row(start[1].incarnation)
    best: _Pair | None = None
    second: _Pair | None = None
    some = index.holding(block_names, 1) if num_held else 0
    for seat in tails:
        num_cached = 0
        if num_held and index.bits.get(seat.worker_id, 0) & some:
            num_cached = num_held if seat is holder else index.depth_of(block_names, seat.worker_id)
        pair = _pair(request, row, start, seat, num_cached)
        if pair is None:
            continue
        if best is None or pair[0] < best[0]:
            best, second = pair, best
        elif second is None or pair[0] < second[0]:
            second = pair
    return None if best is None else (best, second)


def _pair(request: RoutedRequest, row: Mapping[str, Link], start: Start, decode: Seat, num_cached: int) -> _Pair | None:
    """``row``: the links of who prefills."""
    prefill = start[1]
    if not decode.is_decode or decode.lane not in prefill.lane.peers:
        return None
    cost = None
    link = row.get(decode.incarnation)
    if link is not None:
        if not link.is_calm:
            return None
        cost = link.price
    if cost is None:
        cost = SAME_HOST if prefill.host_id and prefill.host_id == decode.host_id else OTHER_HOST
    num_tokens, size = request.num_tokens, request.block_size
    num_blocks = -(-num_tokens // size)
    if num_blocks > decode.available_blocks:
        return None
    num_sent = num_blocks - num_cached
    max_num_tokens = prefill.max_num_tokens
    if num_sent * size > max_num_tokens and num_tokens > max_num_tokens:
        num_sent = -(-max_num_tokens // size)
    transfer_s = cost.fixed_s + num_sent * request.block_bytes / cost.bytes_per_s
    return start[0] + decode.load_s + transfer_s, start, decode, transfer_s, num_cached


def _remote(pair: _Pair) -> Candidate:
    _, (_, prefill, prefill_s, fetch), decode, transfer_s, _ = pair
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
            decode.wait_s,
            interference_s,
            fetch,
            0,
            worth_s,
        )
    )


def _local(request: RoutedRequest, decode: Seat, num_cached: int) -> Candidate:
    """What the choice is compared with: the decode worker computes the prompt itself."""
    num_left = request.num_tokens - num_cached * request.block_size
    prefill_s = decode.prefill_s(num_left if num_left > 0 else 1)
    stall_s = prefill_s * decode.running + decode.crowding_s
    worth_s = decode.curiosity * prefill_s
    return _make(
        (Mode.LOCAL, decode.view, None, decode.queue_s, prefill_s, 0.0, decode.wait_s, stall_s, None, 0, worth_s)
    )
