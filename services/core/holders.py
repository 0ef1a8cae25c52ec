"""The workers behind the bits of a prefix index, as seats of a fleet. Remembered, since many blocks have the same holders."""

from __future__ import annotations

from typing import TypeAlias

from baton.services.core.fleet import Fleet, Neighbours, Seat
from baton.services.core.prefix_index import PrefixIndex

# So many are listed; of more, the least loaded one of each lane is found where it stands in front, not far from the head.
_MAX_LISTED = 64
_MAX_REMEMBERED = 1 << 15

_MAX_HOSTS = 8  # of the holders of one prefix

# A holder, the prefill workers on its host, the bits of all of them but itself, and whether they are of one lane: then of those
# that hold nothing the least loaded is the best.
Near: TypeAlias = tuple[Seat, Neighbours, int, bool]
Held: TypeAlias = tuple[list[Seat], list[Seat], list[Near]]  # those that prefill, the others; see ``Holders.near``

NOBODY: Held = ([], [], [])


class Holders:
    """For one fleet and one index."""

    __slots__ = ("_fleet", "_fleet_version", "_index", "_index_version", "_known", "_near", "_seats")

    def __init__(self, fleet: Fleet, index: PrefixIndex) -> None:
        self._fleet = fleet
        self._index = index
        self._known: dict[int, Held] = {}
        self._near: dict[Seat, Near] = {}  # by holder
        self._seats: list[Seat | None] = []  # by the place of the bit
        self._fleet_version = self._index_version = -1

    def among(self, bits: int) -> Held:
        """All behind the bits, or, where they are many, the least loaded one of each lane. Not to be changed."""
        if self._fleet.version != self._fleet_version or self._index.version != self._index_version:
            self._begin_anew()
        found = self._known.get(bits)
        if found is None:
            if bits.bit_count() > _MAX_LISTED:
                return self._first(bits)
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            found = self._known[bits] = self._listed(bits)
        return found

    def near(self, held: Held) -> list[Near]:
        """Who is near those that ``among`` has just told of."""
        prefill, others, near = held
        if not near:  # most are never asked for
            hosts = {holder.host: holder for holder in (*others[::-1], *prefill[::-1])}
            near += [self._near_to(holder) for holder in list(hosts.values())[: -_MAX_HOSTS - 1 : -1]]
        return near

    def _near_to(self, holder: Seat) -> Near:
        near = self._near.get(holder)
        if near is None:
            workers, bits = holder.host.prefill, 0
            for seat in workers.seats:
                if seat is not holder:
                    bits |= self._index.bits.get(seat.worker_id, 0)
            are_alike = len({seat.lane for seat in workers.seats}) == 1
            near = self._near[holder] = holder, workers, bits, are_alike
        return near

    def _begin_anew(self) -> None:
        """Workers have come or gone."""
        self._fleet_version, self._index_version = self._fleet.version, self._index.version
        self._known.clear()
        self._near.clear()
        find = self._fleet.seats.get
        self._seats = [find(worker_id) for worker_id in self._index.worker_ids]

    def _listed(self, bits: int) -> Held:
        prefill: list[Seat] = []
        others: list[Seat] = []
        while bits:
            last = bits & -bits
            seat = self._seats[last.bit_length() - 1]
            if seat is not None:
                (prefill if seat.is_prefill else others).append(seat)
            bits ^= last
        return prefill, others, []

    def _first(self, bits: int) -> Held:
        prefill, others = (
            [seat for lane in lanes if (seat := lane.first_of(bits, self._index.bits)) is not None]
            for lanes in (self._fleet.prefill_lanes, self._fleet.decode_lanes)
        )
        return prefill, others, []
