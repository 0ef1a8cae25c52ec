"""The workers of a cluster, kept in the order of their load, so that a choice need not look at all of them.

Workers that do the same for a request, at nearly the same speed, share a lane: role, blocks, versions of the wire, speed of a
prompt token. Within a lane the one with the least load is the best for every prompt that none of them knows, so a choice
looks at the head of each lane, at those that hold the prompt's blocks, and at neighbours of both on the same host.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from baton.kvtransfer.versions import VersionRange
from baton.services.core.candidates import Role, WorkerView
from baton.services.core.cost_model import interpolate
from baton.services.core.pricing import batch_wait_s, crowding_s

# Speeds in one lane differ by at most this: what is lost by going by load alone.
LANE_SPREAD = 1.1
_LOG_SPREAD = math.log(LANE_SPREAD)
_MAX_HOST_NEIGHBOURS = 16  # with more on a host, the head of a lane is on it soon enough
# Loads closer than this are equal; below it, a worker's number makes its place in the lane its own.
_SAME_S, _NUMBER_S = 1e-9, 1e-13

LaneKey: TypeAlias = tuple[Role, str, VersionRange, int]


class Seat:
    """One worker: its last report, and its load since. Seconds are those that the router's prices are made of."""

    __slots__ = (
        "available_blocks",
        "crowding_each_s",
        "crowding_s",
        "curiosity",
        "curve",
        "floor_s",
        "host_id",
        "incarnation",
        "is_decode",
        "is_prefill",
        "lane",
        "load_s",
        "max_num_seqs",
        "max_num_tokens",
        "number",
        "place",
        "queue_s",
        "queued_tokens",
        "running",
        "token_s",
        "view",
        "wait_s",
        "worker_id",
    )

    def __init__(self, view: WorkerView, lane: Lane, number: int) -> None:
        self.worker_id = view.worker_id
        self.lane = lane
        self.number = number
        self.is_prefill = view.role is Role.PREFILL
        self.is_decode = view.role is Role.DECODE
        self.crowding_s = self.wait_s = 0.0
        self.place = 0.0  # its key in the lane
        self.set_view(view)

    def set_view(self, view: WorkerView) -> None:
        self.view = view
        self.incarnation = view.incarnation
        self.host_id = view.host_id
        self.token_s = view.cost.prefill_s_per_token
        self.floor_s = view.cost.prefill_floor_s
        self.curve = view.cost.curve
        self.curiosity = view.cost.curiosity
        self.available_blocks = view.available_blocks
        self.max_num_seqs = view.max_num_seqs
        self.max_num_tokens = view.max_num_batched_tokens
        self.crowding_each_s = crowding_s(view, 1)
        self.set_load(view.queued_tokens, view.running)

    def set_load(self, queued_tokens: int, running: int) -> None:
        self.queued_tokens = queued_tokens
        self.running = running
        self.queue_s = self.load_s = queue_s = queued_tokens * self.token_s
        if not self.is_prefill:
            self.crowding_s = busy_s = self.crowding_each_s * running
            self.wait_s = wait_s = 0.0 if running < self.max_num_seqs else batch_wait_s(self.view, running)
            self.load_s = queue_s + busy_s + wait_s

    def prefill_s(self, num_tokens: int) -> float:
        """See ``WorkerCost.prefill_s``."""
        if self.curve:
            return interpolate(self.curve, num_tokens)
        prefill_s = num_tokens * self.token_s
        return prefill_s if prefill_s > self.floor_s else self.floor_s

    def current_view(self) -> WorkerView:
        """The report with the load of now."""
        view = self.view
        if view.queued_tokens != self.queued_tokens or view.running != self.running:
            self.view = view = replace(view, queued_tokens=self.queued_tokens, running=self.running)
        return view


class Lane:
    """Workers alike, least loaded first. A seat whose load has grown moves when its turn comes; until then it stands too far in
    front, so the one that is found is never more loaded than one that is not."""

    __slots__ = ("key", "peers", "places", "seats")

    def __init__(self, key: LaneKey) -> None:
        self.key = key
        self.seats: list[Seat] = []
        self.places: list[float] = []  # of the seats
        self.peers: set[Lane] = set()  # lanes that exchange blocks with it

    def insert(self, seat: Seat) -> None:
        seat.place = place = seat.load_s + seat.number * _NUMBER_S
        at = bisect_left(self.places, place)
        self.places.insert(at, place)
        self.seats.insert(at, seat)

    def remove(self, seat: Seat) -> None:
        seats = self.seats
        at = bisect_left(self.places, seat.place)
        while seats[at] is not seat:  # loads of hours leave no room for the numbers
            at += 1
        del self.places[at], seats[at]

    def first(self, spread: int) -> Seat:
        """The least loaded one; which of equal ones ``spread`` tells, a number that the request has: equal workers share equal
        work."""
        seats, places = self.seats, self.places
        while True:
            at = 0
            if len(places) > 1 and places[1] - places[0] <= _SAME_S:
                at = spread % bisect_left(places, places[0] + _SAME_S)
            seat = seats[at]
            if seat.load_s <= seat.place:
                return seat
            del places[at], seats[at]
            self.insert(seat)

    def first_of(self, holders: int, bits: Mapping[str, int]) -> Seat | None:
        """The least loaded one whose bit is among ``holders``."""
        seats = self.seats
        at = 0
        while at < len(seats):
            seat = seats[at]
            if seat.load_s > seat.place:
                del self.places[at], seats[at]
                self.insert(seat)
            elif bits.get(seat.worker_id, 0) & holders:
                return seat
            else:
                at += 1
        return None

    def head(self, count: int) -> list[Seat]:
        """The least loaded ones."""
        seats = self.seats
        at = 0
        while at < count and at < len(seats):
            seat = seats[at]
            if seat.load_s <= seat.place:
                at += 1
            else:
                del self.places[at], seats[at]
                self.insert(seat)
        return seats[:count]


class Fleet:
    """All workers that can be used now."""

    def __init__(self) -> None:
        self.seats: dict[str, Seat] = {}
        self.prefill_lanes: list[Lane] = []
        self.decode_lanes: list[Lane] = []
        self.num_prefill = 0
        self.version = 0
        """Changes when a worker comes, goes or begins anew."""
        self._lanes: dict[LaneKey, Lane] = {}
        self._hosts: dict[str, tuple[list[Seat], list[Seat]]] = {}  # those that prefill, and the others
        self._free_numbers: list[int] = []

    def __len__(self) -> int:
        return len(self.seats)

    def put(self, view: WorkerView) -> None:
        """A worker has come, or has reported. Its load in ``view`` holds until it is changed."""
        seat = self.seats.get(view.worker_id)
        if seat is not None:
            if seat.lane.key == _lane_key(view) and seat.view.host_id == view.host_id:
                seat.lane.remove(seat)
                self.version += view.incarnation != seat.incarnation
                seat.set_view(view)
                seat.lane.insert(seat)
                return
            self.remove(view.worker_id)
        number = self._free_numbers.pop() if self._free_numbers else len(self.seats)
        seat = self.seats[view.worker_id] = Seat(view, self._lane(view), number)
        seat.lane.insert(seat)
        self.num_prefill += seat.is_prefill
        self.version += 1
        if view.host_id:
            self._hosts.setdefault(view.host_id, ([], []))[not seat.is_prefill].append(seat)

    def set_load(self, worker_id: str, queued_tokens: int, running: int) -> None:
        """What a worker has to do has changed since its report."""
        seat = self.seats.get(worker_id)
        if seat is not None:
            seat.set_load(queued_tokens, running)
            if seat.load_s < seat.place - _SAME_S:
                seat.lane.remove(seat)
                seat.lane.insert(seat)

    def remove(self, worker_id: str) -> None:
        """The worker is gone, or cannot be used for now."""
        seat = self.seats.pop(worker_id, None)
        if seat is None:
            return
        lane = seat.lane
        lane.remove(seat)
        self._free_numbers.append(seat.number)
        self.num_prefill -= seat.is_prefill
        self.version += 1
        if seat.view.host_id:
            neighbours = self._hosts[seat.view.host_id]
            neighbours[not seat.is_prefill].remove(seat)
            if not any(neighbours):
                del self._hosts[seat.view.host_id]
        if not lane.seats:
            del self._lanes[lane.key]
            self._lanes_like(seat).remove(lane)
            for peer in tuple(lane.peers):
                peer.peers.discard(lane)

    def views(self) -> list[WorkerView]:
        return [seat.current_view() for seat in self.seats.values()]

    def prefill_on(self, host_id: str) -> Sequence[Seat]:
        """The prefill workers of a host, where there are few."""
        found = self._hosts.get(host_id)
        return () if found is None or len(found[0]) > _MAX_HOST_NEIGHBOURS else found[0]

    def neighbour(self, seat: Seat) -> Seat | None:
        """The least loaded worker of the other kind on its host, where there are few."""
        found = self._hosts.get(seat.host_id)
        return None if found is None else _least_loaded(found[seat.is_prefill])

    def least_loaded_on(self, host_id: str) -> list[Seat]:
        """Of each kind, where there are few."""
        found = self._hosts.get(host_id, ())
        return [seat for seats in found if (seat := _least_loaded(seats)) is not None]

    def _lane(self, view: WorkerView) -> Lane:
        key = _lane_key(view)
        lane = self._lanes.get(key)
        if lane is None:
            lane = Lane(key)
            for other in self._lanes.values():
                if other.seats[0].view.exchanges_blocks_with(view):
                    lane.peers.add(other)
                    other.peers.add(lane)
            lane.peers.add(lane)
            self._lanes[key] = lane
            (self.prefill_lanes if view.role is Role.PREFILL else self.decode_lanes).append(lane)
        return lane

    def _lanes_like(self, seat: Seat) -> list[Lane]:
        return self.prefill_lanes if seat.is_prefill else self.decode_lanes


def _least_loaded(seats: Sequence[Seat]) -> Seat | None:
    if not 0 < len(seats) <= _MAX_HOST_NEIGHBOURS:
        return None
    best = seats[0]
    for seat in seats:
        if seat.load_s < best.load_s:
            best = seat
    return best


def _lane_key(view: WorkerView) -> LaneKey:
    speed = math.floor(math.log(max(view.cost.prefill_s_per_token, 1e-12)) / _LOG_SPREAD)
    return view.role, view.compatibility, view.wire_versions, speed
