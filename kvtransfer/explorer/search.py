"""Search through every state that can be reached, each looked at once: first all that need no fault, then all that need one,
and so on; breadth-first among those with equally many. So a trace has as few faults as can be, then as few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from baton.kvtransfer.explorer.configuration import Configuration
from baton.kvtransfer.explorer.invariants import Violation
from baton.kvtransfer.explorer.moves import MachineTypes
from baton.kvtransfer.explorer.world import Broken, State, Step, World


@dataclass(frozen=True, slots=True)
class Found:
    """The result of an exploration. ``trace`` is the way to the violation, as lines to read."""

    num_states: int
    num_transitions: int
    num_machine_states: int
    violation: Violation | None = None
    trace: tuple[str, ...] = ()


class _Stopped(Exception):
    def __init__(self, violation: Violation, trace: tuple[str, ...]) -> None:
        super().__init__(str(violation))
        self.violation = violation
        self.trace = trace


def explore(
    configuration: Configuration,
    machine_types: MachineTypes | None = None,
    *,
    strip: bool = True,
    on_faults: Callable[[int, int], None] | None = None,
) -> Found:
    """Looks at every state. ``on_faults`` is told how many faults were tried and how many states that made so far."""
    search = _Search(World(configuration, machine_types, strip=strip))
    try:
        search.run(configuration.max_faults, on_faults)
    except _Stopped as stopped:
        return search.found(stopped.violation, stopped.trace)
    return search.found()


class _Search:
    def __init__(self, world: World) -> None:
        self._world = world
        first = world.first()
        self._came_from: dict[State, State] = {first: first}
        self._num_transitions = 0

    def found(self, violation: Violation | None = None, trace: tuple[str, ...] = ()) -> Found:
        return Found(len(self._came_from), self._num_transitions, len(self._world.machines), violation, trace)

    def run(self, max_faults: int, on_faults: Callable[[int, int], None] | None) -> None:
        layer = list(self._came_from)
        for num_faults in range(max_faults + 1):
            if num_faults:
                layer = self._follow(layer, self._world.faults)
            layer = self._close(layer)
            if on_faults is not None:
                on_faults(num_faults, len(self._came_from))
        taken = self._world.machines.check_fences()
        if taken is not None:
            machine, violation = taken
            at = next(state for state in self._came_from if self._world.has_machine(state, machine))
            raise _Stopped(violation, (*self._trace(at), "a message of another handoff arrives"))

    def _close(self, layer: list[State]) -> list[State]:
        """The layer with all that follows from it without a fault."""
        frontier = layer
        while frontier:
            frontier = self._follow(frontier, self._world.steps)
            layer = [*layer, *frontier]
        return layer

    def _follow(self, states: Iterable[State], steps: Callable[[State], Iterable[Step]]) -> list[State]:
        """The states that are one step further and were not seen before."""
        came_from, num_transitions = self._came_from, 0
        fresh: list[State] = []
        for state in states:
            try:
                for _, after in steps(state):
                    num_transitions += 1
                    if after not in came_from:
                        came_from[after] = state
                        fresh.append(after)
            except Broken as broken:
                raise _Stopped(broken.violation, (*self._trace(state), _line(broken.label))) from broken
            except Violation as violation:
                raise _Stopped(violation, self._trace(state)) from violation
        self._num_transitions += num_transitions
        return fresh

    def _trace(self, state: State) -> tuple[str, ...]:
        lines: list[str] = []
        while (before := self._came_from[state]) != state:
            label = next((label for label, after in self._world.steps(before) if after == state), None)
            if label is not None:
                lines.append(_line(label))
            else:
                fault = next(label for label, after in self._world.faults(before) if after == state)
                lines.append(f"{_line(fault)}   (fault)")
            state = before
        return tuple(reversed(lines))


def _line(label: tuple[Any, ...]) -> str:
    return " ".join(map(str, label))
