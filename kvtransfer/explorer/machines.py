"""The production machines, remembered: each distinct state of one is a number, and each step is taken only once.

A machine is a pure function of its state, the event and the time. Its state is all of its attributes. Time is abstract here:
every event comes at time 0 and every timer that is armed lies far ahead, until the explorer decides that it is the next
thing to happen. So a timer may fire in any order with everything else, which includes every order that real clocks allow.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable
from enum import StrEnum
from typing import Any, NamedTuple

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import Fenced, TransferCode, TransferError
from baton.kvtransfer.explorer.invariants import Invariant, Violation
from baton.kvtransfer.machine import Machine
from baton.kvtransfer.protocol import ReceiverState, SenderState

_NOW = 0.0
_FAR_AHEAD = 1e9


# What is left of a machine once its end is decided. By type and state: both machines have an "acked".
_ALWAYS_NEEDED = {"handoff", "state", "_timers", "limits", "error"}
_NEEDED: dict[tuple[type[StrEnum], StrEnum], set[str]] = {
    (SenderState, SenderState.SETTLING): {"report"},
    (SenderState, SenderState.ACKED): set(),
    (SenderState, SenderState.FAILED): set(),
    (ReceiverState, ReceiverState.WITHDRAWING): {"report", "slots", "_token", "_landed"},
    (ReceiverState, ReceiverState.QUARANTINE): {"report", "slots", "_token", "_landing", "_landed"},
    (ReceiverState, ReceiverState.CLOSED): {"_token"},
}


class Outcome(NamedTuple):
    """What a step led to."""

    machine: int
    commands: tuple[m.Command, ...]


class Machines:
    """Numbers for machine states and for messages. The objects behind them are never changed: a step is taken by a copy.

    ``strip``: a machine that only waits for its end loses what it needs no more, so that there are fewer states. That it does
    not need it is certain: without the attribute it could not go on.
    """

    def __init__(self, *, strip: bool = True) -> None:
        self._strip = strip
        self._numbers: dict[Hashable, int] = {}
        self._machines: list[Machine[Any]] = []
        self._steps: dict[tuple[int, Any], Outcome | Violation] = {}
        self.words: list[m.PeerMessage] = []
        self._words: dict[m.PeerMessage, int] = {}

    def __len__(self) -> int:
        return len(self._machines)

    def __getitem__(self, number: int) -> Machine[Any]:
        """To be looked at."""
        return self._machines[number]

    def word(self, message: m.PeerMessage) -> int:
        """The number of a message."""
        number = self._words.setdefault(message, len(self.words))
        if number == len(self.words):
            self.words.append(message)
        return number

    def hear(self, number: int, word: int) -> Outcome:
        """What a machine makes of a message. Raises Violation when it has no place for it."""
        known = self._steps.get((number, ~word))
        if known is None:
            try:
                known = self._take(number, self.words[word])
            except Violation as violation:
                known = violation
            self._steps[number, ~word] = known
        if isinstance(known, Violation):
            raise known
        return known

    def add(self, machine: Machine[Any]) -> int:
        """The number of a machine's state. The machine is not to be used any more."""
        needed = _NEEDED.get((type(machine.state), machine.state)) if self._strip else None
        if needed is not None:
            for name in vars(machine).keys() - _ALWAYS_NEEDED - needed:
                delattr(machine, name)
        machine._timers = dict.fromkeys(machine._timers, _FAR_AHEAD)
        state = _freeze_machine(machine)
        number = self._numbers.setdefault(state, len(self._machines))
        if number == len(self._machines):
            self._machines.append(machine)
        return number

    def armed(self, number: int) -> tuple[type[m.Timeout], ...]:
        """The timers that could fire."""
        return tuple(self._machines[number]._timers)

    def step(self, number: int, event: m.Event | type[m.Timeout]) -> Outcome:
        """What a machine makes of an event, or of one of its timers. Raises Violation when it has no place for it."""
        key = (number, event)
        known = self._steps.get(key)
        if known is None:
            try:
                known = self._take(number, event)
            except Violation as violation:
                known = violation
            self._steps[key] = known
        if isinstance(known, Violation):
            raise known
        return known

    def check_fences(self) -> tuple[int, Violation] | None:
        """Offers every message to every machine of another handoff, in every state that it was ever in: it must be refused.

        Returns the number of the first machine that takes one, and the violation.
        """
        for number, machine in enumerate(self._machines):
            if machine.state.value == "idle":
                continue  # it is left in the step that makes the machine
            probe = _copy(machine)
            for message in self.words:
                if message.handoff == machine.handoff:
                    continue
                try:
                    probe.receive(message, _NOW)
                except Fenced:
                    continue
                except Exception as error:
                    why = repr(error)
                else:
                    why = "it was taken"
                what = f"{type(message).__name__} of {message.handoff} reached {machine.handoff}: {why}"
                return number, Violation(Invariant.FENCE, what)
            if _freeze_machine(probe) != _freeze_machine(machine):
                return number, Violation(Invariant.FENCE, f"{machine.handoff} was changed by messages that it refused")
        return None

    def _take(self, number: int, event: m.Event | type[m.Timeout]) -> Outcome:
        machine = _copy(self._machines[number])
        name = event.__name__ if isinstance(event, type) else type(event).__name__
        where = f"{type(machine).__name__} in {machine.state.value}"
        try:
            if isinstance(event, type):
                machine._timers[event] = _NOW
                commands = machine.handle_timer(_NOW)
            else:
                commands = machine.receive(event, _NOW)
        except Exception as error:
            raise Violation(Invariant.NO_CONFUSION, f"{where} cannot take {name}: {error!r}") from error
        return Outcome(self.add(machine), tuple(map(_plain, commands)))


def _plain(command: m.Command) -> m.Command:
    """Why something failed is told to people; the protocol does not depend on it. Without it there are fewer states."""
    if isinstance(command, m.Send) and isinstance(command.message, m.Refuse | m.Abort):
        return m.Send(dataclasses.replace(command.message, code=TransferCode.ABORTED, reason=""))
    return command


def _copy(machine: Machine[Any]) -> Machine[Any]:
    twin: Machine[Any] = object.__new__(type(machine))
    for name, value in vars(machine).items():
        setattr(twin, name, copy.copy(value) if isinstance(value, dict | list | set) else value)
    return twin


def _freeze_machine(machine: Machine[Any]) -> Hashable:
    return type(machine), tuple((name, _freeze(value)) for name, value in sorted(vars(machine).items()))


def _freeze(value: Any) -> Hashable:
    match value:
        case dict():
            return tuple(sorted((str(key), _freeze(item)) for key, item in value.items()))
        case list():
            return tuple(value)
        case set():
            return frozenset(value)
        case TransferError():
            return True
        case m.TransferReport():
            return dataclasses.replace(value, duration_ms=0.0, commit_ms=0.0, reserve_wait_ms=0.0)
        case _:
            hash(value)
            frozen: Hashable = value
            return frozen
