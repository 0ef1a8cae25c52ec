"""What must hold in every state that can be reached."""

from __future__ import annotations

from enum import StrEnum


class Invariant(StrEnum):
    """Each is checked where it could first be broken, so that the trace that leads there is a shortest one."""

    OWNERSHIP = "no block is unowned or owned twice"
    READABLE = "what can be read is what its name says, verified and committed"
    LATE_WRITE = "nothing is written into memory that is not this handoff's"
    SENDER_REUSE = "the sender's blocks are not released while they are being read"
    ENDS_ONCE = "every handoff ends once on each side"
    AGREEMENT = "only what was taken over is acknowledged"
    FENCE = "a message of another attempt or process changes nothing"
    NO_CONFUSION = "no machine is surprised by an honest peer or its own host"
    NO_DEADLOCK = "always something can happen, until all is over and released"


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: Invariant, detail: str) -> None:
        super().__init__(invariant, detail)
        self.invariant = invariant
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.invariant.value}: {self.detail}"
