"""The whole that is explored: the handoffs, the pool that they share, and the two worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from baton.kvtransfer.explorer import pool as pools
from baton.kvtransfer.explorer.configuration import Configuration, Fault, Scenario
from baton.kvtransfer.explorer.faults import Faults
from baton.kvtransfer.explorer.invariants import Invariant, Violation
from baton.kvtransfer.explorer.lane import ABSENT, GONE, Effect, Lane, check_holds
from baton.kvtransfer.explorer.machines import Machines
from baton.kvtransfer.explorer.moves import MachineTypes, Move, Moves
from baton.kvtransfer.explorer.pool import Pool


class Processes(NamedTuple):
    """How often each worker was replaced, and whether it runs."""

    prefill_lives: int = 0
    decode_lives: int = 0
    prefill_up: bool = True
    decode_up: bool = True


State = int
"""Everything, in one number: the parts' numbers side by side. Numbers are small and quick to compare."""

_PART_BITS = 24
_PART = (1 << _PART_BITS) - 1


Step = tuple[tuple[Any, ...], State]
"""What happens, in words, and the state that it leads to."""


class Broken(Exception):
    """What happens breaks an invariant."""

    def __init__(self, label: tuple[Any, ...], violation: Violation) -> None:
        super().__init__(label, violation)
        self.label = label
        self.violation = violation


class _Numbers:
    """Numbers for values, and back."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def of(self, value: Any) -> int:
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class _Here(NamedTuple):
    """A state taken apart, each part a number."""

    processes: int
    pool: int
    lanes: tuple[int, ...]


class _LaneMove(NamedTuple):
    """A move with its lane as a number."""

    label: tuple[Any, ...]
    lane: int
    effects: tuple[Effect, ...]
    violation: Violation | None


class World:
    """Knows the first state and what follows each. What follows in one handoff is worked out once and looked up after."""

    def __init__(
        self, configuration: Configuration, machine_types: MachineTypes | None = None, *, strip: bool = True
    ) -> None:
        self.configuration = configuration
        self.machines = Machines(strip=strip)
        types = machine_types or MachineTypes()
        numbers = range(configuration.num_handoffs)
        self._moves = [Moves(configuration, number, self.machines, types) for number in numbers]
        self._faults = [Faults(configuration, moves) for moves in self._moves]
        self._lanes = [_Numbers() for _ in numbers]
        self._pools = _Numbers()
        self._processes = _Numbers()
        self._free: list[dict[int, list[_LaneMove]]] = [{} for _ in numbers]
        self._faulty: list[dict[int, list[_LaneMove]]] = [{} for _ in numbers]
        self._applied: dict[tuple[int, int, tuple[Effect, ...]], int] = {}
        self._agreed: list[set[int]] = [set() for _ in numbers]  # pools and lanes that agree on who has what
        self._shifts = [_PART_BITS * (configuration.num_handoffs - 1 - number) for number in numbers]
        self._pool_shift = _PART_BITS * configuration.num_handoffs
        self._processes_shift = self._pool_shift + _PART_BITS
        self._none_open = 0  # the number of a lane in which nothing has happened

    def first(self) -> State:
        """Nothing has happened."""
        lanes = tuple(numbers.of(Lane()) for numbers in self._lanes)
        self._none_open = lanes[0]
        pool = self._pools.of(pools.empty(self.configuration.pool_blocks))
        return self._pack(_Here(self._processes.of(Processes()), pool, lanes))

    def steps(self, state: State) -> Iterator[Step]:
        """What can happen without a fault. Raises Broken, or Violation when nothing can happen and it is not over."""
        here = self._unpack(state)
        for number in self._concluding(here):
            # It makes no difference to the others when this happens, so it happens before anything else.
            if moves := self._free_moves(number, here):
                yield from self._apply_all(moves, number, state, here)
                return
        is_stuck = True
        for number in range(len(here.lanes)):
            if moves := self._free_moves(number, here):
                is_stuck = False
                yield from self._apply_all(moves, number, state, here)
            if self._lane(here, number).is_asking:
                for step in self._grants(number, here):
                    is_stuck = False
                    yield step
        for step in self._life(here):
            is_stuck = False
            yield step
        if is_stuck:
            self._check_over(here)

    def faults(self, state: State) -> Iterator[Step]:
        """What can go wrong; each step is one fault. Raises Broken."""
        here = self._unpack(state)
        concluding = self._concluding(here)
        for number in concluding or range(len(here.lanes)):
            yield from self._apply_all(self._faulty_moves(number, here), number, state, here)
        if concluding or here.lanes[0] == self._none_open:
            return  # nothing to spoil but what just concludes
        kinds = self.configuration.faults
        life: Processes = self._processes.values[here.processes]
        lanes = [self._lane(here, number) for number in range(len(here.lanes))]
        if Fault.LINK in kinds and any(lane.sender >= 0 for lane in lanes):
            for late in (False, True):
                moved = [faults.lose_link(lane, late=late) for faults, lane in zip(self._faults, lanes, strict=True)]
                yield self._together(moved, here)
        if Fault.CRASH in kinds and life.prefill_up:
            moved = [faults.kill_sender(lane) for faults, lane in zip(self._faults, lanes, strict=True)]
            dead = self._processes.of(life._replace(prefill_up=False))
            yield self._together(moved, here._replace(processes=dead))
        if Fault.CRASH in kinds and life.decode_up:
            moved = [faults.kill_receiver(lane) for faults, lane in zip(self._faults, lanes, strict=True)]
            dead = self._processes.of(life._replace(decode_up=False))
            fresh = self._pools.of(pools.empty(self.configuration.pool_blocks))
            yield self._together(moved, here._replace(processes=dead, pool=fresh))

    def _concluding(self, here: _Here) -> list[int]:
        return [number for number in range(len(here.lanes)) if self._lane(here, number).is_concluding]

    def _free_moves(self, number: int, here: _Here) -> list[_LaneMove]:
        known = self._free[number].get(here.lanes[number])
        if known is None:
            known = self._numbered(number, self._moves[number].free(self._lane(here, number)))
            self._free[number][here.lanes[number]] = known
        return known

    def _faulty_moves(self, number: int, here: _Here) -> list[_LaneMove]:
        known = self._faulty[number].get(here.lanes[number])
        if known is None:
            known = self._numbered(number, self._faults[number].of(self._lane(here, number)))
            self._faulty[number][here.lanes[number]] = known
        return known

    def has_machine(self, state: State, machine: int) -> bool:
        here = self._unpack(state)
        lanes = (self._lane(here, number) for number in range(len(here.lanes)))
        return any(machine in (lane.sender, lane.receiver) for lane in lanes)

    # Handoffs begin, room is made, and dead workers are replaced.

    def _grants(self, number: int, here: _Here) -> Iterator[Step]:
        granted = pools.reserve(self._pools.values[here.pool], number, self._moves[number].names)
        if granted is not None:
            moves = [self._moves[number].grant(self._lane(here, number), granted[1])]
            for move in self._numbered(number, moves):
                yield self._apply(move, number, here._replace(pool=self._pools.of(granted[0])))

    def _life(self, here: _Here) -> Iterator[Step]:
        life: Processes = self._processes.values[here.processes]
        if not life.prefill_up:
            revived = life._replace(prefill_up=True, prefill_lives=life.prefill_lives + 1)
            yield ("P is replaced",), self._pack(here._replace(processes=self._processes.of(revived)))
        if not life.decode_up:
            revived = life._replace(decode_up=True, decode_lives=life.decode_lives + 1)
            yield ("D is replaced",), self._pack(here._replace(processes=self._processes.of(revived)))
        if life.prefill_up and life.decode_up:
            for number in range(len(here.lanes)):
                if self._may_open(number, here, life):
                    yield self._open(number, here, life)

    def _may_open(self, number: int, here: _Here, life: Processes) -> bool:
        """In the order of their numbers, which loses nothing where they are alike."""
        if self._lane(here, number).sender != ABSENT:
            return False
        if number == 0:
            return True
        before = self._lane(here, number - 1)
        if self.configuration.scenario is Scenario.REQUESTS or before.sender == ABSENT:
            return before.sender != ABSENT
        has_failed = "failed" in (before.sender_end, before.receiver_end) or GONE in (before.sender, before.receiver)
        is_replaced = life.prefill_lives + life.decode_lives >= number
        return has_failed and (self.configuration.scenario is Scenario.ATTEMPTS or is_replaced)

    def _open(self, number: int, here: _Here, life: Processes) -> Step:
        label = (f"gateway opens handoff {number + 1}",)
        handoff = self.configuration.handoff(number, life.prefill_lives, life.decode_lives)
        retired = [faults.replace_sender(self._lane(here, other)) for other, faults in enumerate(self._faults)]
        here = self._unpack(self._together(retired, here)[1])
        lanes = list(here.lanes)
        lanes[number] = self._lanes[number].of(self._moves[number].open(handoff))
        return self._checked(label, here._replace(lanes=tuple(lanes)))

    # Carrying out.

    def _numbered(self, number: int, moves: list[Move]) -> list[_LaneMove]:
        prefix, of = f"{number + 1}:", self._lanes[number].of
        return [_LaneMove((prefix, *move.label), of(move.lane), move.effects, move.violation) for move in moves]

    def _apply_all(self, moves: list[_LaneMove], number: int, state: State, here: _Here) -> Iterator[Step]:
        """Most moves leave the pool alone: for them it is enough to put the lane's new number into the state's."""
        shift = self._shifts[number]
        others = state & ~(_PART << shift)
        agreed = self._agreed[number]
        pool_bits = here.pool << _PART_BITS
        for move in moves:
            if move.effects or move.violation is not None or pool_bits | move.lane not in agreed:
                yield self._apply(move, number, here)
            else:
                yield move.label, others | move.lane << shift

    def _apply(self, move: _LaneMove, number: int, here: _Here) -> Step:
        pool = self._apply_to_pool(here.pool, number, move.effects, move.label)
        if move.violation is not None:
            raise Broken(move.label, move.violation)
        lanes = (*here.lanes[:number], move.lane, *here.lanes[number + 1 :])
        return self._checked(move.label, _Here(here.processes, pool, lanes))

    def _together(self, moves: list[Move], here: _Here) -> Step:
        """Something that happens to all handoffs at once."""
        label, pool = moves[0].label, here.pool
        for number, move in enumerate(moves):
            pool = self._apply_to_pool(pool, number, move.effects, label)
            if move.violation is not None:
                raise Broken(label, move.violation)
        lanes = tuple(self._lanes[number].of(move.lane) for number, move in enumerate(moves))
        return self._checked(label, here._replace(pool=pool, lanes=lanes))

    def _apply_to_pool(self, pool: int, number: int, effects: tuple[Effect, ...], label: tuple[Any, ...]) -> int:
        if not effects:
            return pool
        known = self._applied.get((pool, number, effects))
        if known is None:
            value: Pool = self._pools.values[pool]
            try:
                for effect in effects:
                    value = getattr(pools, effect.name)(value, number, *effect.arguments)
            except Violation as violation:
                raise Broken(label, violation) from violation
            known = self._applied[pool, number, effects] = self._pools.of(value)
        return known

    def _checked(self, label: tuple[Any, ...], here: _Here) -> Step:
        """Every handoff and the pool agree on who has what."""
        for number, lane in enumerate(here.lanes):
            key = here.pool << _PART_BITS | lane
            if key not in self._agreed[number]:
                value: Pool = self._pools.values[here.pool]
                try:
                    check_holds(self._lanes[number].values[lane], self.machines, value.held_by(number))
                except Violation as violation:
                    raise Broken(label, violation) from violation
                self._agreed[number].add(key)
        return label, self._pack(here)

    def _check_over(self, here: _Here) -> None:
        for number in range(len(here.lanes)):
            lane = self._lane(here, number)
            if (lane.sender >= 0 and not lane.sender_end) or (lane.receiver >= 0 and not lane.receiver_end):
                states = [self.machines[one].state.value for one in (lane.sender, lane.receiver) if one >= 0]
                raise Violation(Invariant.NO_DEADLOCK, f"handoff {number + 1} never ends: {' and '.join(states)}")
        pool: Pool = self._pools.values[here.pool]
        if not pool.is_released:
            raise Violation(Invariant.NO_DEADLOCK, f"all is over and blocks are still held: {pool.blocks}")

    # States as numbers.

    def _lane(self, here: _Here, number: int) -> Lane:
        lane: Lane = self._lanes[number].values[here.lanes[number]]
        return lane

    @staticmethod
    def _pack(here: _Here) -> State:
        packed = here.processes << _PART_BITS | here.pool
        for lane in here.lanes:
            packed = packed << _PART_BITS | lane
        return packed

    def _unpack(self, state: State) -> _Here:
        lanes = tuple(state >> shift & _PART for shift in self._shifts)
        return _Here(state >> self._processes_shift, state >> self._pool_shift & _PART, lanes)
