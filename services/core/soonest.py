"""Where a prompt can be computed soonest: the prefill worker whose queue, fetch and computing are over first.

Workers are looked at in an order that tells when to stop. Nobody who knows ``n`` blocks of a prompt, or can get them, is done
before the least loaded worker of all would be with these ``n`` blocks: once that is later than the best that was found, those
who know as little or less need no look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from baton.services.core.candidates import RoutedRequest
from baton.services.core.cost_model import OTHER_HOST, SAME_HOST
from baton.services.core.fetch import FetchMode, FetchPlan
from baton.services.core.fleet import Fleet, Seat
from baton.services.core.holders import Holders
from baton.services.core.links import LinkView
from baton.services.core.prefix_index import Level, PrefixIndex

NEVER_S = 1e9
_MAX_LEVELS = 8
_MAX_HOSTS = 8  # of the holders of one prefix

Start: TypeAlias = tuple[float, Seat, float, FetchPlan | None]  # start_s, who prefills, prefill_s, fetch
_plan = FetchPlan._make  # a fraction of the time of a call with names


class Soonest:
    """Starts for one request, among them the best."""

    __slots__ = ("_block_names", "_fleet", "_index", "_links", "_may_fetch", "_request", "_some", "best_s", "starts")

    def __init__(
        self, fleet: Fleet, index: PrefixIndex, request: RoutedRequest, block_names: Sequence[bytes], links: LinkView
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._request = request
        self._block_names = block_names
        self._links = links
        self._may_fetch = request.fetch is not None and request.fetch.mode is not FetchMode.OFF
        self._some = index.some_of(block_names)
        self.starts: list[Start] = []
        self.best_s = NEVER_S

    def search(self, best: Start | None, firsts: Sequence[Seat], held: Level, holders: Holders) -> None:
        """``best``: of those who hold the longest known prefix. ``firsts``: the least loaded of each lane."""
        if best is not None:
            self.starts.append(best)
            self.best_s = best[0]
        num_held, bits = held
        prefill, others = holders.among(bits)
        source = best[1] if best is not None else others[0] if others else None
        if self._may_fetch:
            self._offer_neighbours(prefill, others, num_held)
        for seat in firsts:
            if seat not in prefill:
                self._offer(seat, self._num_here(seat), source, num_held)
        if self._some == bits or not self._can_any_win(firsts, num_held - 1):
            return
        for num_blocks, bits in self._index.levels(self._block_names, _MAX_LEVELS)[1:]:
            if not self._can_any_win(firsts, num_blocks):
                return
            prefill, others = holders.among(bits)
            least_s = self.best_s
            for seat in prefill:
                if seat.queue_s < least_s and seat not in firsts:
                    self._offer(seat, num_blocks, source, num_held)
            if self._may_fetch:
                self._offer_neighbours(prefill, others, num_blocks)

    def _num_here(self, seat: Seat) -> int:
        bit = self._index.bits.get(seat.worker_id, 0)
        return self._index.depth(self._block_names, bit) if bit & self._some else 0

    def _can_any_win(self, firsts: Sequence[Seat], num_blocks: int) -> bool:
        """Whether one would be the best if it had so many blocks."""
        num_left = max(1, self._request.num_tokens - num_blocks * self._request.block_size)
        for seat in firsts:
            prefill_s = seat.prefill_s(num_left)
            if seat.queue_s + prefill_s - seat.curiosity * prefill_s < self.best_s:
                return True
        return False

    def _offer_neighbours(self, prefill: Sequence[Seat], others: Sequence[Seat], num_blocks: int) -> None:
        """Prefill workers on the hosts of those who hold so many blocks, which are near them."""
        bits, some = self._index.bits, self._some
        hosts: set[str] = set()
        for holder in (*prefill, *others) if others else prefill:
            host_id = holder.host_id
            if host_id in hosts:
                continue
            hosts.add(host_id)
            if len(hosts) > _MAX_HOSTS:
                return
            empty: Seat | None = None  # the least loaded one that has no block: of one lane, the others are no better
            for seat in self._fleet.prefill_on(host_id):
                if seat.queue_s >= self.best_s or seat is holder:
                    continue
                if bits.get(seat.worker_id, 0) & some:
                    self._offer(seat, self._num_here(seat), holder, num_blocks)
                elif empty is None:
                    empty = seat
                elif seat.lane is not empty.lane:
                    self._offer(seat, 0, holder, num_blocks)
                elif seat.queue_s < empty.queue_s:
                    empty = seat
            if empty is not None:
                self._offer(empty, 0, holder, num_blocks)

    def _offer(self, seat: Seat, num_here: int, holder: Seat | None, num_there: int) -> None:
        """With what the holder has, if that is quicker, else with its own blocks."""
        request = self._request
        start_s = seat.queue_s
        num_blocks = num_here
        plan: FetchPlan | None = None
        if num_there > num_here and holder is not None and holder is not seat:
            plan = plan_fetch_from(request, self._links, holder, seat, num_there, num_here)
            if plan is not None:
                num_blocks = plan.num_blocks
                start_s += plan.fetch_s
        num_left = request.num_tokens - num_blocks * request.block_size
        prefill_s = seat.prefill_s(num_left if num_left > 0 else 1)
        start_s += prefill_s - seat.curiosity * prefill_s
        self.starts.append((start_s, seat, prefill_s, plan))
        if start_s < self.best_s:
            self.best_s = start_s

    def best_two(self) -> tuple[Start | None, Start | None]:
        """The best, and the best of another worker."""
        best: Start | None = None
        second: Start | None = None
        for start in self.starts:
            if best is None or start[0] < best[0]:
                if best is not None and best[1] is not start[1]:
                    second = best
                best = start
            elif start[1] is not best[1] and (second is None or start[0] < second[0]):
                second = start
        return best, second


def plan_fetch_from(
    request: RoutedRequest, links: LinkView, holder: Seat, needer: Seat, num_there: int, num_here: int
) -> FetchPlan | None:
    """See ``fetch.plan_fetch``; there is one to ask."""
    policy = request.fetch
    if policy is None or policy.mode is FetchMode.OFF or needer.lane not in holder.lane.peers:
        return None
    size = request.block_size
    num_useful = (request.num_tokens - 1) // size
    num_blocks = num_there if num_there < num_useful else num_useful
    num_new = num_blocks - num_here
    compute_s = num_new * size * needer.token_s
    is_wanted = policy.mode is FetchMode.ALWAYS
    if num_new <= 0 or (compute_s <= policy.round_trips_s and not is_wanted):
        return None
    cost = SAME_HOST if holder.host_id and holder.host_id == needer.host_id else OTHER_HOST
    link = links.row(holder.incarnation).get(needer.incarnation)
    if link is not None:
        if not link.is_calm:
            return None
        cost = link.price or cost
    fetch_s = policy.round_trips_s + cost.fixed_s + num_new * request.block_bytes / cost.bytes_per_s
    if fetch_s >= compute_s and not is_wanted:
        return None
    return _plan((holder.worker_id, num_blocks, num_new, fetch_s, compute_s, policy.min_patience_s + compute_s))
