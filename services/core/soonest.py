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
from baton.services.core.fetch import FetchMode, FetchPlan, FetchPolicy
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

    __slots__ = (
        "_block_names",
        "_fleet",
        "_index",
        "_links",
        "_num_useful",
        "_policy",
        "_request",
        "_some",
        "best_s",
        "starts",
    )

    def __init__(
        self, fleet: Fleet, index: PrefixIndex, request: RoutedRequest, block_names: Sequence[bytes], links: LinkView
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._request = request
        self._block_names = block_names
        self._links = links
        policy = request.fetch
        self._policy = None if policy is None or policy.mode is FetchMode.OFF else policy
        self._num_useful = (request.num_tokens - 1) // request.block_size  # the last token is computed in any case
        self._some = index.holding(block_names, 1)
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
        if self._policy is not None:
            self._offer_neighbours(prefill, others, num_held)
        for seat in firsts:
            if seat not in prefill:
                self._offer(seat, self._num_here(seat), source, num_held)
        if self._some == bits:
            return
        least = self._least_to_win(firsts)
        if least >= num_held or not self._index.holding(self._block_names, least) & self._some & ~bits:
            return
        for num_blocks, bits in self._index.levels(self._block_names, _MAX_LEVELS)[1:]:
            if num_blocks < self._least_to_win(firsts):
                return
            prefill, others = holders.among(bits)
            for seat in prefill:
                if seat.queue_s < self.best_s and seat not in firsts:
                    self._offer(seat, num_blocks, source, num_held)
            if self._policy is not None:
                self._offer_neighbours(prefill, others, num_blocks)

    def _num_here(self, seat: Seat) -> int:
        bit = self._index.bits.get(seat.worker_id, 0)
        return self._index.depth(self._block_names, bit) if bit & self._some else 0

    def _least_to_win(self, firsts: Sequence[Seat]) -> int:
        """So many blocks at least somebody must have to be the best; 1 where that is not plain."""
        num_tokens, size = self._request.num_tokens, self._request.block_size
        least = num_tokens
        for seat in firsts:
            if seat.curve or seat.curiosity:
                return 1
            num_left = (self.best_s - seat.queue_s) / seat.token_s
            num_blocks = int((num_tokens - num_left) // size)
            if num_blocks < least:
                least = num_blocks
        return least if least > 1 else 1

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
            best_s = self.best_s
            empty: Seat | None = None  # the least loaded one that has no block: of one lane, the others are no better
            for seat in self._fleet.prefill_on(host_id):
                queue_s = seat.queue_s
                if queue_s >= best_s or seat is holder:
                    continue
                if bits.get(seat.worker_id, 0) & some:
                    self._offer(seat, self._num_here(seat), holder, num_blocks)
                elif empty is None:
                    empty = seat
                elif seat.lane is not empty.lane:
                    self._offer(seat, 0, holder, num_blocks)
                elif queue_s < empty.queue_s:
                    empty = seat
            if empty is not None:
                self._offer(empty, 0, holder, num_blocks)

    def _offer(self, seat: Seat, num_here: int, holder: Seat | None, num_there: int) -> None:
        """With what the holder has, if that is quicker, else with its own blocks."""
        request = self._request
        size = request.block_size
        start_s = seat.queue_s
        num_left = request.num_tokens - num_here * size
        plan: FetchPlan | None = None
        if num_there > num_here and holder is not None and self._policy is not None:
            if num_there > self._num_useful:
                num_there = self._num_useful
            num_new = num_there - num_here
            if num_new > 0 and seat.lane in holder.lane.peers:
                plan = self._plan(seat, holder, num_there, num_new, self._policy)
                if plan is not None:
                    num_left -= num_new * size
                    start_s += plan[3]
        prefill_s = seat.prefill_s(num_left if num_left > 0 else 1)
        start_s += prefill_s - seat.curiosity * prefill_s
        self.starts.append((start_s, seat, prefill_s, plan))
        if start_s < self.best_s:
            self.best_s = start_s

    def _plan(self, needer: Seat, holder: Seat, num_blocks: int, num_new: int, policy: FetchPolicy) -> FetchPlan | None:
        """See ``fetch.plan_fetch``; there is one to ask."""
        request = self._request
        compute_s = num_new * request.block_size * needer.token_s
        round_trips_s = policy.round_trips_s
        is_wanted = policy.mode is FetchMode.ALWAYS
        if compute_s <= round_trips_s and not is_wanted:
            return None
        cost = SAME_HOST if holder.host_id and holder.host_id == needer.host_id else OTHER_HOST
        link = self._links.row(holder.incarnation).get(needer.incarnation)
        if link is not None:
            if not link.is_calm:
                return None
            cost = link.price or cost
        fetch_s = round_trips_s + cost.fixed_s + num_new * request.block_bytes / cost.bytes_per_s
        if fetch_s >= compute_s and not is_wanted:
            return None
        return _plan((holder.worker_id, num_blocks, num_new, fetch_s, compute_s, policy.min_patience_s + compute_s))

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
