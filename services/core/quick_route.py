"""The router for many workers: it prices the few that can be the cheapest instead of every pair.

Those few are, of each kind: the head of every lane (see ``fleet``), the holders of the prompt's longest known prefixes, and the
neighbours of both on their hosts. What is chosen costs at most as much more than the cheapest pair of all as the cheapest
usable link costs less than the chosen one, for the handoff and for a fetch, and a lane's spread of the prefill time; with
links of equal cost and workers of equal speed it is the cheapest. Where the few need a second look (a link in trouble, a
request that failed before), they go through ``router.route`` like a small cluster does.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from baton.services.core.candidates import Placement, RoutedRequest, RoutingDecision, WorkerView
from baton.services.core.errors import BatonError
from baton.services.core.few_workers import Few, cheapest
from baton.services.core.first_look import first_look
from baton.services.core.fleet import Fleet, Seat
from baton.services.core.holders import Holders
from baton.services.core.links import LinkView, PairKey, Standing
from baton.services.core.prefix_index import Level, PrefixIndex
from baton.services.core.router import route

# A cluster with at most so many pairs is priced whole.
FEW_PAIRS = 64
_MAX_LEVELS = 3
_MAX_HOLDERS = 4  # looked at of a level, of each kind
# Of each lane: at first, and then, while none of those will do.
_HEADS = (1, 8, 32)


class FleetRouter:
    """Decides for one gateway. ``fleet`` and ``index`` are kept up to date by whoever hears the workers."""

    def __init__(self, fleet: Fleet, index: PrefixIndex, *, few_pairs: int = FEW_PAIRS) -> None:
        self.fleet = fleet
        self._index = index
        self._holders = Holders(fleet, index)
        self._few_pairs = few_pairs

    def route(
        self,
        request: RoutedRequest,
        block_names: Sequence[bytes],
        placement: Placement,
        links: LinkView,
        now: float,
    ) -> RoutingDecision:
        """See ``router.route``. ``request.cached_blocks`` is not read: the names of the prompt's blocks tell."""
        fleet = self.fleet
        if (fleet.num_prefill + 1) * (len(fleet) - fleet.num_prefill) <= self._few_pairs:
            return self._among(request, block_names, fleet.views(), placement, links, now)
        if not (request.excluded or request.excluded_pairs or request.preferred):
            if placement is Placement.REMOTE:
                decision = first_look(fleet, self._index, self._holders, request, block_names, links)
                if decision is not None:
                    return decision
            few = self._few(request, block_names, _HEADS[0])
            decision = cheapest(request, few, placement, links, now)
            if decision is not None:
                return decision
        return self._look_again(request, block_names, placement, links, now)

    def _look_again(
        self,
        request: RoutedRequest,
        block_names: Sequence[bytes],
        placement: Placement,
        links: LinkView,
        now: float,
    ) -> RoutingDecision:
        """Asks more and more workers, until there is one choice that nothing speaks against."""
        preferred: list[Seat] = []
        if request.preferred:
            preferred = [seat for seat in self.fleet.seats.values() if seat.incarnation in request.preferred]
        decision: RoutingDecision | None = None
        refusal: BatonError | None = None
        for num_heads in _HEADS:
            few = self._few(request, block_names, num_heads)
            views = {seat.view.worker_id: seat.current_view() for seat in (*few.prefill, *few.decode, *preferred)}
            try:
                decision = self._among(request, block_names, list(views.values()), placement, links, now)
            except BatonError as error:
                refusal = error
                continue
            if _is_plain(decision, placement, links, now):
                return decision
        if decision is None:
            assert refusal is not None
            raise refusal
        return decision

    def _among(
        self,
        request: RoutedRequest,
        block_names: Sequence[bytes],
        views: Sequence[WorkerView],
        placement: Placement,
        links: LinkView,
        now: float,
    ) -> RoutingDecision:
        return route(replace(request, cached_blocks=self._index.matches(block_names)), views, placement, links, now)

    def _few(self, request: RoutedRequest, block_names: Sequence[bytes], num_heads: int) -> Few:
        """The workers worth pricing: holders of the longest prefixes, then the least loaded, and who is near them."""
        fleet, bits = self.fleet, self._index.bits
        few = Few([], [], {})
        levels = self._index.levels(block_names, _MAX_LEVELS) if block_names else []
        near: list[Seat] = []
        for level in levels:
            for seats in self._holders.among(level.holders)[:2]:
                least = seats if len(seats) <= _MAX_HOLDERS else sorted(seats, key=_load_s)[:_MAX_HOLDERS]
                for seat in least:
                    few.add(seat, level.num_blocks)
                if level is levels[0] and request.fetch is not None:
                    for host in dict.fromkeys(seat.host for seat in least):  # in one order everywhere
                        least_of_kind = (host.prefill.least(), host.others.least())
                        near += [neighbour for neighbour in least_of_kind if neighbour is not None]
        spread = zlib.crc32(request.request_id.encode())
        for lanes in (fleet.prefill_lanes, fleet.decode_lanes):
            best: Seat | None = None
            for lane in lanes:
                for seat in (lane.first(spread),) if num_heads == 1 else lane.head(num_heads):
                    if best is None or seat.load_s < best.load_s:
                        best = seat
                    near.append(seat)
            stranger = None if best is None else best.strangers.least()
            if stranger is not None:
                near.append(stranger)
        for seat in near:
            if seat.worker_id not in few.cached:
                few.add(seat, _num_cached(levels, bits, seat) if levels else 0)
        return few


def _load_s(seat: Seat) -> float:
    return seat.load_s


def _num_cached(levels: Sequence[Level], bits: Mapping[str, int], seat: Seat) -> int:
    bit = bits.get(seat.worker_id, 0)
    for num_blocks, holders in levels:
        if holders & bit:
            return num_blocks
    return 0


def _is_plain(decision: RoutingDecision, placement: Placement, links: LinkView, now: float) -> bool:
    """It is of the kind that was asked for, and its link is well."""
    prefill, decode = decision.chosen.prefill, decision.chosen.decode
    if prefill is None:
        return placement is not Placement.REMOTE
    return links.standing(PairKey(prefill.incarnation, decode.incarnation), now) is Standing.FINE
