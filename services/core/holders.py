"""The workers behind the bits of a prefix index, as seats of a fleet. Remembered, since many blocks have the same holders."""

from __future__ import annotations

from typing import TypeAlias

from baton.services.core.fleet import Fleet, Seat
from baton.services.core.prefix_index import PrefixIndex

# So many are listed; of more, the least loaded one of each lane is found where it stands in front, not far from the head.
_MAX_LISTED = 64
_MAX_REMEMBERED = 4096

Seats: TypeAlias = tuple[list[Seat], list[Seat]]  # those that prefill, and the others


class Holders:
    """For one fleet and one index."""

    __slots__ = ("_fleet", "_fleet_version", "_index", "_index_version", "_known")

    def __init__(self, fleet: Fleet, index: PrefixIndex) -> None:
        self._fleet = fleet
        self._index = index
        self._known: dict[int, Seats] = {}
        self._fleet_version = self._index_version = -1

    def among(self, bits: int) -> Seats:
        """All behind the bits, or, where they are many, the least loaded one of each lane. Not to be changed."""
        fleet, index = self._fleet, self._index
        if fleet.version != self._fleet_version or index.version != self._index_version:
            self._fleet_version, self._index_version = fleet.version, index.version
            self._known.clear()
        found = self._known.get(bits)
        if found is None:
            if bits.bit_count() > _MAX_LISTED:
                return self._first(bits)
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            found = self._known[bits] = self._listed(bits)
        return found

    def _listed(self, bits: int) -> Seats:
        find = self._fleet.seats.get
        prefill: list[Seat] = []
        others: list[Seat] = []
        for worker_id in self._index.holders(bits):
            seat = find(worker_id)
            if seat is not None:
                (prefill if seat.is_prefill else others).append(seat)
        return prefill, others

    def _first(self, bits: int) -> Seats:
        prefill, others = (
            [seat for lane in lanes if (seat := lane.first_of(bits, self._index.bits)) is not None]
            for lanes in (self._fleet.prefill_lanes, self._fleet.decode_lanes)
        )
        return prefill, others
