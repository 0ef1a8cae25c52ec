"""The choice that most requests of a large cluster get: where the prompt is computed soonest, and the decode worker that suits
it. A few microseconds; whatever is not plain is left to a second look (``quick_route``).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from baton.services.core.candidates import Candidate, Mode, RoutedRequest, RoutingDecision
from baton.services.core.fetch import FetchPlan
from baton.services.core.fleet import Fleet, Seat
from baton.services.core.holders import NOBODY, Holders
from baton.services.core.links import LinkView
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.soonest import NEVER_S, Start, link_cost, soonest

_REASON = "cheapest of the prefill/decode pairs that are likely to be"
_REMOTE, _LOCAL = Mode.REMOTE, Mode.LOCAL
# A fraction of the time of a call with names.
_new = tuple.__new__


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
    held = NOBODY
    num_held = some = 0
    if block_names:
        num_held, bits, some = deepest = index.deepest(block_names)
        if bits:
            held = holders.among(bits)
    here, others, _ = held
    num_left = num_tokens - num_held * size
    if num_left < 1:
        num_left = 1

    start: Start | None = None
    second: Start | None = None
    start_s = NEVER_S
    best: Seat | None = None
    for seat in here:
        if best is None or seat.queue_s < best.queue_s or seat.lane is not best.lane:
            prefill_s = seat.prefill_s(num_left)
            at_s = seat.queue_s + prefill_s - seat.curiosity * prefill_s
            if at_s < start_s:
                start, start_s, best = (at_s, seat, prefill_s, None), at_s, seat
    for lane in fleet.prefill_lanes:
        seat = lane.first(spread)
        if seat is best:
            continue
        prefill_s = seat.prefill_s(num_left)
        at_s = seat.queue_s + prefill_s - seat.curiosity * prefill_s
        if num_held:
            if at_s < start_s:  # with all blocks that there are
                firsts = [lane.first(spread) for lane in fleet.prefill_lanes]
                start, second = soonest(request, block_names, index, holders, links, deepest, held, start, firsts)
                break
            if seat not in here:
                prefill_s = seat.prefill_s(num_tokens)
                at_s = seat.queue_s + prefill_s - seat.curiosity * prefill_s
        if at_s < start_s:
            second, start, start_s, best = start, (at_s, seat, prefill_s, None), at_s, seat
        elif second is None or at_s < second[0]:
            second = (at_s, seat, prefill_s, None)
    if start is None:
        return None

    # Who decodes: of the least loaded ones, those who hold most of the prompt, and those on the same host.
    start_s, prefill, _, _ = start
    tails = [lane.first(spread) for lane in fleet.decode_lanes]
    holder: Seat | None = None
    for seat in others:
        if holder is None or seat.load_s < holder.load_s:
            holder = seat
    if holder is not None and holder not in tails:
        tails.append(holder)
    near = prefill.host.others.least()
    if near is not None and near not in tails:
        tails.append(near)
    num_blocks = -(-num_tokens // size)
    num_last = num_blocks if num_tokens <= prefill.max_num_tokens else -(-prefill.max_num_tokens // size)
    row = links.row(prefill.incarnation)
    decode: Seat | None = None
    other: Seat | None = None  # the second best
    decode_s = other_s = NEVER_S  # prices
    transfer_s = other_transfer_s = 0.0
    num_cached = 0
    for seat in tails:
        cost = link_cost(row, prefill, seat)
        if cost is None or num_blocks > seat.available_blocks or not seat.is_decode:
            continue
        num_here = 0
        if some and index.bits.get(seat.worker_id, 0) & some:
            num_here = num_held if seat is holder else index.depth_of(block_names, seat.worker_id)
        num_sent = num_blocks - num_here
        if num_sent > num_last:
            num_sent = num_last
        sent_s = cost.fixed_s + num_sent * request.block_bytes / cost.bytes_per_s
        price_s = start_s + seat.load_s + sent_s
        if price_s < decode_s:
            other, other_s, other_transfer_s = decode, decode_s, transfer_s
            decode, decode_s, transfer_s, num_cached = seat, price_s, sent_s, num_here
        elif price_s < other_s:
            other, other_s, other_transfer_s = seat, price_s, sent_s
    if decode is None:
        return None

    chosen, runner_up = (start, decode, transfer_s), None if other is None else (start, other, other_transfer_s)
    if second is not None and second[0] + decode.load_s < other_s:
        prefill = second[1]
        cost = link_cost(links.row(prefill.incarnation), prefill, decode)
        if cost is not None:
            num_sent = num_blocks - num_cached
            if num_sent * size > prefill.max_num_tokens < num_tokens:
                num_sent = -(-prefill.max_num_tokens // size)
            sent_s = cost.fixed_s + num_sent * request.block_bytes / cost.bytes_per_s
            price_s = second[0] + decode.load_s + sent_s
            if price_s < decode_s:  # its link is that much quicker
                chosen, runner_up = (second, decode, sent_s), chosen
            elif price_s < other_s:
                runner_up = (second, decode, sent_s)
    if (request.ttft_target_s is not None or request.tpot_target_s is not None) and not _meets_targets(
        request, *chosen
    ):
        return None
    other_way = _local(request, decode, num_cached)
    return _new(
        RoutingDecision, (_remote(*chosen), other_way if runner_up is None else _remote(*runner_up), _REASON, other_way)
    )


def _meets_targets(request: RoutedRequest, start: Start, decode: Seat, transfer_s: float) -> bool:
    """Those that the request has, by prediction."""
    start_s, prefill, prefill_s, _ = start
    ttft_s = start_s + prefill.curiosity * prefill_s + transfer_s + decode.wait_s
    if request.ttft_target_s is not None and ttft_s > request.ttft_target_s:
        return False
    return request.tpot_target_s is None or decode.view.cost.step_s(decode.running + 1) <= request.tpot_target_s


def _remote(start: Start, decode: Seat, transfer_s: float) -> Candidate:
    _, prefill, prefill_s, fetch = start
    return _new(
        Candidate,
        (
            _REMOTE,
            decode.view,
            prefill.view,
            prefill.queue_s,
            prefill_s,
            transfer_s,
            decode.wait_s,
            decode.crowding_s + decode.queue_s,
            None if fetch is None else FetchPlan._make(fetch),
            0,
            prefill.curiosity * prefill_s,
            1.0,
        ),
    )


def _local(request: RoutedRequest, decode: Seat, num_cached: int) -> Candidate:
    """What the choice is compared with: the decode worker computes the prompt itself."""
    num_left = request.num_tokens - num_cached * request.block_size
    prefill_s = decode.prefill_s(num_left if num_left > 0 else 1)
    stall_s = prefill_s * decode.running + decode.crowding_s
    worth_s = decode.curiosity * prefill_s
    return _new(
        Candidate,
        (_LOCAL, decode.view, None, decode.queue_s, prefill_s, 0.0, decode.wait_s, stall_s, None, 0, worth_s, 1.0),
    )
