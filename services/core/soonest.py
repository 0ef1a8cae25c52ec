"""Where a prompt can be computed soonest: the prefill worker whose queue, fetch and computing are over first.

Workers are looked at in an order that tells when to stop. Nobody who knows ``n`` blocks of a prompt, or can get them, is done
before the least loaded worker of all would be with these ``n`` blocks: once that is later than the best that was found, those
who know as little or less need no look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from baton.services.core.candidates import RoutedRequest
from baton.services.core.cost_model import OTHER_HOST, SAME_HOST, LinkCost
from baton.services.core.fetch import FetchMode
from baton.services.core.fleet import Seat
from baton.services.core.holders import Held, Holders, Near
from baton.services.core.links import Link, LinkView
from baton.services.core.prefix_index import PrefixIndex

NEVER_S = 1e9
_OFF, _ALWAYS = FetchMode.OFF, FetchMode.ALWAYS
_MAX_LEVELS = 8

# Fields of a ``FetchPlan``, and who is asked. Plain tuples: most are never needed.
Fetch: TypeAlias = tuple[str, int, int, float, float, float]
Start: TypeAlias = tuple[float, Seat, float, Fetch | None]  # start_s, who prefills, prefill_s, fetch
_Offer: TypeAlias = tuple[Seat, int, Seat | None, int]  # who would prefill, its own blocks, who has more, how many


def soonest(
    request: RoutedRequest,
    block_names: Sequence[bytes],
    index: PrefixIndex,
    holders: Holders,
    links: LinkView,
    deepest: tuple[int, int, int],
    held: Held,
    best: Start | None,
    firsts: Sequence[Seat],
) -> tuple[Start | None, Start | None]:
    """The best, and the best of another worker. ``deepest``: see the index. ``held``: who hold the longest known prefix.
    ``best``: of these. ``firsts``: the least loaded of each lane."""
    num_held, bits, some = deepest
    prefill, others, _ = held
    can_fetch = request.fetch is not None and request.fetch.mode is not _OFF
    source = best[1] if best is not None else others[0] if others else None
    offers: list[_Offer] = []
    if can_fetch:
        _add_neighbours(offers, index, block_names, deepest, holders.near(held), best)
    for seat in firsts:
        if seat not in prefill:
            bit = index.bits.get(seat.worker_id, 0) & some
            offers.append((seat, index.depth(block_names, bit) if bit else 0, source, num_held))
    best, second = _take(request, links, offers, best, None)
    if some == bits:
        return best, second
    least = _least_to_win(request, firsts, best)
    if least >= num_held or not index.holding(block_names, least) & some & ~bits:
        return best, second
    num_blocks, rest = num_held, some & ~bits
    for _ in range(_MAX_LEVELS):
        num_blocks, bits = index.deepest_of(block_names, rest, num_blocks)
        held = holders.among(bits)
        offers = [(seat, num_blocks, source, num_held) for seat in held[0] if seat not in firsts]
        if can_fetch:
            _add_neighbours(offers, index, block_names, (num_blocks, bits, some), holders.near(held), best)
        best, second = _take(request, links, offers, best, second)
        rest &= ~bits
        if not rest or num_blocks <= _least_to_win(request, firsts, best):
            break
    return best, second


def _add_neighbours(
    offers: list[_Offer],
    index: PrefixIndex,
    block_names: Sequence[bytes],
    level: tuple[int, int, int],
    near: Sequence[Near],
    best: Start | None,
) -> None:
    """Prefill workers on the hosts of those who hold so many blocks, which are near them."""
    best_s = NEVER_S if best is None else best[0]
    num_blocks, _, some = level
    for holder, workers, their_bits, are_alike in near:
        least = workers.least()
        if least is None:
            continue
        if are_alike and not their_bits & some:
            # Where the holder itself is the least loaded one, others with nothing are later.
            if least is not holder and least.queue_s < best_s:
                offers.append((least, 0, holder, num_blocks))
            continue
        empty: Seat | None = None  # the least loaded one that has no block: of one lane, the others are no better
        for seat in workers.seats:
            queue_s = seat.queue_s
            if queue_s >= best_s or seat is holder:
                continue
            bit = index.bits.get(seat.worker_id, 0) & some
            if bit:
                offers.append((seat, index.depth(block_names, bit), holder, num_blocks))
            elif empty is None:
                empty = seat
            elif seat.lane is not empty.lane:
                offers.append((seat, 0, holder, num_blocks))
            elif queue_s < empty.queue_s:
                empty = seat
        if empty is not None:
            offers.append((empty, 0, holder, num_blocks))


def _take(
    request: RoutedRequest, links: LinkView, offers: Sequence[_Offer], best: Start | None, second: Start | None
) -> tuple[Start | None, Start | None]:
    """The best two of these and of the two that there are. Each with what the other has, if that is quicker, else with its own
    blocks; see ``fetch.plan_fetch``."""
    num_tokens, size, policy = request.num_tokens, request.block_size, request.fetch
    num_useful = 0
    round_trips_s = 0.0
    is_wanted = False
    if policy is not None and policy.mode is not _OFF:
        num_useful = (num_tokens - 1) // size  # the last token is computed in any case
        round_trips_s = policy.round_trips_s
        is_wanted = policy.mode is _ALWAYS
    best_s = NEVER_S if best is None else best[0]
    second_s = NEVER_S if second is None else second[0]
    for seat, num_here, holder, num_there in offers:
        start_s = seat.queue_s
        if start_s >= second_s:
            continue
        num_left = num_tokens - num_here * size
        num_new = (num_there if num_there < num_useful else num_useful) - num_here
        fetch: Fetch | None = None
        if num_new > 0 and holder is not None:
            compute_s = num_new * size * seat.token_s
            if compute_s > round_trips_s or is_wanted:
                cost = link_cost(links.row(holder.incarnation), holder, seat)
                if cost is not None:
                    fetch_s = round_trips_s + cost.fixed_s + num_new * request.block_bytes / cost.bytes_per_s
                    if fetch_s < compute_s or is_wanted:
                        assert policy is not None
                        patience_s = policy.min_patience_s + compute_s
                        fetch = (holder.worker_id, num_here + num_new, num_new, fetch_s, compute_s, patience_s)
                        start_s += fetch_s
                        num_left -= num_new * size
        prefill_s = seat.prefill_s(num_left if num_left > 0 else 1)
        start_s += prefill_s - seat.curiosity * prefill_s
        if start_s < best_s:
            if best is not None and best[1] is not seat:
                second, second_s = best, best_s
            best, best_s = (start_s, seat, prefill_s, fetch), start_s
        elif start_s < second_s and (best is None or seat is not best[1]):
            second, second_s = (start_s, seat, prefill_s, fetch), start_s
    return best, second


def _least_to_win(request: RoutedRequest, firsts: Sequence[Seat], best: Start | None) -> int:
    """So many blocks at least somebody must have to be the best; 1 where that is not plain."""
    num_tokens, size = request.num_tokens, request.block_size
    best_s = NEVER_S if best is None else best[0]
    least = num_tokens
    for seat in firsts:
        if seat.curve or seat.curiosity:
            return 1
        num_left = (best_s - seat.queue_s) / seat.token_s
        num_blocks = int((num_tokens - num_left) // size)
        if num_blocks < least:
            least = num_blocks
    return least if least > 1 else 1


def link_cost(row: Mapping[str, Link], source: Seat, target: Seat) -> LinkCost | None:
    """What it costs to send blocks; None: they cannot be sent, or something speaks against it. ``row``: the source's links."""
    if target.lane not in source.lane.peers:
        return None
    link = row.get(target.incarnation)
    if link is not None:
        if not link.is_calm:
            return None
        if link.price is not None:
            return link.price
    return SAME_HOST if source.host is target.host else OTHER_HOST
