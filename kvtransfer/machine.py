"""What both machines of the handoff protocol are made of: a table of rules, an interpreter for it, and timers.

Rules of this file: it knows no state and no message of the protocol by name. ``protocol.py`` has those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from baton.kvtransfer.errors import Fenced, LocalProtocolError, RemoteProtocolError
from baton.kvtransfer.identity import HandoffId
from baton.kvtransfer.messages import Command, Event, PeerMessage, Timeout

State = TypeVar("State", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Rule(Generic[State]):
    """One transition. ``when`` and ``do`` name methods of the machine: a question, and what to do, in order."""

    to: State
    do: tuple[str, ...] = ()
    when: str | None = None


def go(to: State, *do: str, when: str | None = None) -> Rule[State]:
    """Reads as a table's cell: go to this state, doing this, when that holds."""
    return Rule(to, do, when)


Rules = tuple[Rule[State], ...]
Row = Mapping[type[Event], Rules[State]]
Table = Mapping[State, Row[State]]


def row(events: Iterable[type[Event]], *rules: Rule[State]) -> dict[type[Event], Rules[State]]:
    """The same rules for several events."""
    return dict.fromkeys(events, rules)


class Machine(Generic[State]):
    """One side of one handoff. Events go in with the time, commands come out; nothing else happens.

    An event that is fenced, or that the table has no place for, raises and changes nothing. The shell calls
    ``handle_timer`` when ``deadline`` has come, and always before ``receive``, so that nothing is accepted after an expiry
    only because a timer fired late.
    """

    TABLE: ClassVar[Table[Any]]

    def __init__(self, handoff: HandoffId, state: State) -> None:
        self.handoff = handoff
        self.state: State = state
        self._timers: dict[type[Timeout], float] = {}

    @property
    def deadline(self) -> float | None:
        """When ``handle_timer`` must be called next."""
        return min(self._timers.values(), default=None)

    def receive(self, event: Event, now: float) -> list[Command]:
        """Takes one event and says what to do. Raises Fenced, RemoteProtocolError or LocalProtocolError."""
        if isinstance(event, Timeout):
            raise LocalProtocolError("timeouts are the machine's own events")
        if self.deadline is not None and self.deadline <= now:
            raise LocalProtocolError(f"{self.handoff}: handle_timer was not called at {self.deadline}")
        if isinstance(event, PeerMessage):
            if event.handoff != self.handoff:
                raise Fenced(f"{type(event).__name__} for {event.handoff} reached {self.handoff}")
            self._check_fence(event)
        return self._step(event, now)

    def handle_timer(self, now: float) -> list[Command]:
        """Fires every timer that is due, in the order of their times."""
        commands: list[Command] = []
        while self._timers:
            timeout = min(self._timers, key=self._timers.__getitem__)
            if self._timers[timeout] > now:
                break
            del self._timers[timeout]
            commands += self._step(timeout(), now)
        return commands

    def _check_fence(self, message: PeerMessage) -> None:
        """Raises Fenced for a message with the right names and without the right to be heard."""

    def _step(self, event: Event, now: float) -> list[Command]:
        rules: Rules[State] = self.TABLE[self.state].get(type(event), ())
        for rule in rules:
            if rule.when is None or self._holds(rule.when, event):
                break
        else:
            wrong = f"{self.handoff}: {type(event).__name__} in state {self.state.value}"
            raise RemoteProtocolError(wrong) if isinstance(event, PeerMessage) else LocalProtocolError(wrong)
        self.state = rule.to
        commands: list[Command] = []
        for action in rule.do:
            commands += getattr(self, f"_do_{action}")(event, now) or ()
        return commands

    def _holds(self, guard: str, event: Event) -> bool:
        holds: bool = getattr(self, f"_is_{guard}")(event)
        return holds
