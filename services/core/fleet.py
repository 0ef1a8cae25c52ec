"""The workers of a cluster, kept in the order of their load, so that a choice need not look at all of them.

Workers that do the same for a request, at nearly the same speed, share a lane: role, blocks, versions of the wire, speed of a
prompt token. Within a lane the one with the least load is the best for every prompt that none of them knows, so a choice
looks at the head of each lane, at those that hold the prompt's blocks, and at neighbours of both on the same host.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

from baton.kvtransfer.versions import VersionRange
from baton.services.core.candidates import Role, WorkerView
from baton.services.core.cost_model import interpolate
from baton.services.core.pricing import batch_wait_s, crowding_s

# Speeds in one lane differ by at most this: what is lost by going by load alone.
LANE_SPREAD = 1.1
_LOG_SPREAD = math.log(LANE_SPREAD)
_MAX_HOST_NEIGHBOURS = 16  # with more on a host, the head of a lane is on it soon enough

LaneKey: TypeAlias = tuple[Role, str, VersionRange, int]


class Seat:
    """One worker: its last report, and its load since. Seconds are those that the router's prices are made of."""

    __slots__ = (
        "at",
        "available_blocks",
        "crowding_each_s",
        "crowding_s",
        "curiosity",
        "curve",
        "floor_s",
        "host",
        "host_id",
        "incarnation",
        "is_decode",
        "is_prefill",
        "kin",
        "lane",
        "load_s",
        "max_num_seqs",
        "max_num_tokens",
        "placed_s",
        "queue_s",
        "queued_tokens",
        "running",
        "strangers",
        "token_s",
        "view",
        "wait_s",
        "worker_id",
    )

    def __init__(self, view: WorkerView, lane: Lane, host: Host) -> None:
        self.worker_id = view.worker_id
        self.lane = lane
        self.host = host
        self.is_prefill = view.role is Role.PREFILL
        self.is_decode = view.role is Role.DECODE
        self.kin, self.strangers = host.prefill, host.others
        if not self.is_prefill:
            self.kin, self.strangers = host.others, host.prefill
        self.crowding_s = self.wait_s = 0.0
        self.placed_s, self.at = 0.0, 0  # where it stands in the lane
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
        self.kin._least = None

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


class Host:
    """The workers of one machine. Who does not tell is on one where nobody is."""

    __slots__ = ("others", "prefill")

    def __init__(self) -> None:
        self.prefill = Neighbours()
        self.others = Neighbours()


class Neighbours:
    """Those of one kind on one host."""

    __slots__ = ("_least", "seats")

    def __init__(self) -> None:
        self.seats: list[Seat] = []
        self._least: Seat | None = None  # None: not known

    def add(self, seat: Seat) -> None:
        self.seats.append(seat)
        self._least = None

    def remove(self, seat: Seat) -> None:
        self.seats.remove(seat)
        self._least = None

    def least(self) -> Seat | None:
        """The least loaded one, where there are few."""
        least = self._least
        if least is None and 0 < len(self.seats) <= _MAX_HOST_NEIGHBOURS:
            least = self.seats[0]
            for seat in self.seats:
                if seat.load_s < least.load_s:
                    least = seat
            self._least = least
        return least


class Lane:
    """Workers alike, in the order of their load: those of equal load share a place."""

    __slots__ = ("key", "loads", "peers", "places")

    def __init__(self, key: LaneKey) -> None:
        self.key = key
        self.loads: list[float] = []  # that occur, least first
        self.places: dict[float, list[Seat]] = {}  # by load
        self.peers: set[Lane] = set()  # lanes that exchange blocks with it

    def __iter__(self) -> Iterator[Seat]:
        """The least loaded first."""
        for load_s in self.loads:
            yield from self.places[load_s]

    def insert(self, seat: Seat) -> None:
        load_s = seat.placed_s = seat.load_s
        place = self.places.get(load_s)
        if place is None:
            place = self.places[load_s] = []
            insort(self.loads, load_s)
        seat.at = len(place)
        place.append(seat)

    def remove(self, seat: Seat) -> None:
        load_s = seat.placed_s
        place = self.places[load_s]
        last = place.pop()
        if last is not seat:
            place[seat.at] = last
            last.at = seat.at
        elif not place:
            del self.places[load_s], self.loads[bisect_left(self.loads, load_s)]

    def first(self, spread: int) -> Seat:
        """The least loaded one; which of equal ones ``spread`` tells, a number that the request has: equal workers share equal
        work."""
        place = self.places[self.loads[0]]
        return place[spread % len(place)]

    def first_of(self, holders: int, bits: Mapping[str, int]) -> Seat | None:
        """The least loaded one whose bit is among ``holders``."""
        return next((seat for seat in self if bits.get(seat.worker_id, 0) & holders), None)

    def head(self, count: int) -> list[Seat]:
        """The least loaded ones."""
        return list(islice(self, count))


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
        self._hosts: dict[str, Host] = {}

    def __len__(self) -> int:
        return len(self.seats)

    def put(self, view: WorkerView) -> None:
        """A worker has come, or has reported. Its load in ``view`` holds until it is changed."""
        seat = self.seats.get(view.worker_id)
        if seat is not None:
            if seat.lane.key == _lane_key(view) and seat.host_id == view.host_id:
                seat.lane.remove(seat)
                self.version += view.incarnation != seat.incarnation
                seat.set_view(view)
                seat.lane.insert(seat)
                return
            self.remove(view.worker_id)
        host = self._hosts.setdefault(view.host_id, Host()) if view.host_id else Host()
        seat = self.seats[view.worker_id] = Seat(view, self._lane(view), host)
        seat.lane.insert(seat)
        self.num_prefill += seat.is_prefill
        self.version += 1
        if view.host_id:
            seat.kin.add(seat)

    def set_load(self, worker_id: str, queued_tokens: int, running: int) -> None:
        """What a worker has to do has changed since its report."""
        seat = self.seats.get(worker_id)
        if seat is not None:
            seat.set_load(queued_tokens, running)
            if seat.load_s != seat.placed_s:
                seat.lane.remove(seat)
                seat.lane.insert(seat)

    def remove(self, worker_id: str) -> None:
        """The worker is gone, or cannot be used for now."""
        seat = self.seats.pop(worker_id, None)
        if seat is None:
            return
        lane = seat.lane
        lane.remove(seat)
        self.num_prefill -= seat.is_prefill
        self.version += 1
        if seat.host_id:
            seat.kin.remove(seat)
            if not (seat.host.prefill.seats or seat.host.others.seats):
                del self._hosts[seat.host_id]
        if not lane.loads:
            del self._lanes[lane.key]
            self._lanes_like(seat).remove(lane)
            for peer in tuple(lane.peers):
                peer.peers.discard(lane)

    def views(self) -> list[WorkerView]:
        return [seat.current_view() for seat in self.seats.values()]

    def _lane(self, view: WorkerView) -> Lane:
        key = _lane_key(view)
        lane = self._lanes.get(key)
        if lane is None:
            lane = Lane(key)
            for other in self._lanes.values():
                if other.first(0).view.exchanges_blocks_with(view):
                    lane.peers.add(other)
                    other.peers.add(lane)
            lane.peers.add(lane)
            self._lanes[key] = lane
            (self.prefill_lanes if view.role is Role.PREFILL else self.decode_lanes).append(lane)
        return lane

    def _lanes_like(self, seat: Seat) -> list[Lane]:
        return self.prefill_lanes if seat.is_prefill else self.decode_lanes


def _lane_key(view: WorkerView) -> LaneKey:
    speed = math.floor(math.log(max(view.cost.prefill_s_per_token, 1e-12)) / _LOG_SPREAD)
    return view.role, view.compatibility, view.wire_versions, speed
