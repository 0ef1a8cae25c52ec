"""What the failure ladder hears, what it asks for, and the names of its rungs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.router import Candidate, Placement, RoutingDecision
from baton.services.core.token_order import TokenDelta

# Failures of a pair: neither worker is at fault alone, and each may do with another partner, or by itself.
PAIR_FAILURES = frozenset({ErrorCode.HANDOFF_FAILED, ErrorCode.INCOMPATIBLE})
# A worker that says one of these may be asked again later.
PASSING_REFUSALS = frozenset({ErrorCode.DRAINING, ErrorCode.OVERLOADED, ErrorCode.WORKER_LOST})


class Rung(StrEnum):
    """How a request went on after a failure: the reasons of ``baton_fallbacks_total``."""

    OTHER_DECODE = "other_decode"  # the prefill worker stays, and finds the prompt's blocks in its cache
    OTHER_PREFILL = "other_prefill"  # the decode worker stays, with the blocks that it has verified
    OTHER_PAIR = "other_pair"
    LOCAL_PREFILL = "local_prefill"  # a decode worker alone
    SAME_WORKERS = "same_workers"  # nobody else is there, and they can take it again
    QUEUED = "queued"  # nobody could take it for a while


@dataclass(frozen=True, slots=True)
class LadderLimits:
    """How far a request is carried."""

    max_attempts: int = 6
    max_pair_attempts: int = 3  # then decode workers alone
    max_lost_workers: int = 2  # a request under which so many were lost is not tried on another
    max_wait_s: float = 60.0  # for a worker that can take it, in one go
    first_pause_s: float = 0.25  # before a worker that refused is asked again; doubles
    loss_pause_s: float = 0.1  # after a loss: what else went down with that worker is found out first


@dataclass(frozen=True, slots=True)
class Wish:
    """What the router is asked for. Workers are named by incarnation."""

    placement: Placement
    excluded: frozenset[str]
    excluded_pairs: frozenset[tuple[str, str]]  # prefill, decode
    preferred: frozenset[str]  # they hold blocks of this request


# Answers a wish from the workers there are now; raises BatonError where it cannot be met.
Choose: TypeAlias = Callable[[Wish], RoutingDecision]
# Incarnations with a link that works. Asked rarely, and there may be a thousand.
Alive: TypeAlias = Callable[[], Collection[str]]


@dataclass(slots=True)
class Attempt:
    """One try at a request. ``outcome``: "running", "done", "abort" or the code of what went wrong."""

    number: int
    decision: RoutingDecision
    outcome: str = "running"


@dataclass(frozen=True, slots=True)
class PartOutput:
    """What one worker said about its part of an attempt."""

    delta: TokenDelta | None = None
    handed_over: bool = False  # the prefill worker's part is over, and the decode worker goes on
    error: BatonError | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Command: send this attempt to its workers, with these tokens, the decode worker first."""

    attempt: Attempt
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Release:
    """Command: this worker's part of the attempt is over; ``cancel``: it does not know yet."""

    attempt: int
    incarnation: str
    cancel: bool


@dataclass(frozen=True, slots=True)
class Emit:
    """Command: pass these tokens on to the client."""

    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class End:
    """Command, the last one, once: the request is over. ``error`` where it failed."""

    outcome: str
    error: BatonError | None = None


Command: TypeAlias = Start | Release | Emit | End


@dataclass(slots=True)
class Avoided:
    """Workers and pairs that a request keeps away from as long as there are others."""

    first_pause_s: float
    pairs: set[tuple[str, str]] = field(default_factory=set)
    _again_s: dict[str, float] = field(default_factory=dict)  # when a worker may be asked again; inf: never
    _num_refusals: dict[str, int] = field(default_factory=dict)

    def lost(self, incarnation: str, now: float) -> None:
        """It may be asked as soon as its link is back."""
        self._again_s[incarnation] = max(now, self._again_s.get(incarnation, now))

    def refused(self, incarnation: str, now: float) -> None:
        """It cannot take the request now."""
        count = self._num_refusals[incarnation] = self._num_refusals.get(incarnation, 0) + 1
        self._again_s[incarnation] = now + self.first_pause_s * 2 ** (count - 1)

    def failed(self, incarnation: str) -> None:
        """It took the request and could not do it."""
        self._again_s[incarnation] = math.inf

    def all(self) -> frozenset[str]:
        return frozenset(self._again_s)

    def at(self, now: float) -> frozenset[str]:
        """Those that may not even be asked where nobody else is there."""
        return frozenset(name for name, again_s in self._again_s.items() if again_s > now)

    def next_s(self, now: float) -> float:
        """When the next of them may be asked; inf where time alone changes nothing."""
        return min((again_s for again_s in self._again_s.values() if again_s > now), default=math.inf)

    def has_failed(self, incarnation: str) -> bool:
        return self._again_s.get(incarnation) == math.inf


def rung_between(before: Candidate, after: Candidate) -> Rung:
    """How the later of two attempts differs from the one before."""
    is_same_decode = before.decode.incarnation == after.decode.incarnation
    if after.prefill is None:
        if before.prefill is not None:
            return Rung.LOCAL_PREFILL
        return Rung.SAME_WORKERS if is_same_decode else Rung.OTHER_DECODE
    is_same_prefill = before.prefill is not None and before.prefill.incarnation == after.prefill.incarnation
    if is_same_prefill:
        return Rung.SAME_WORKERS if is_same_decode else Rung.OTHER_DECODE
    return Rung.OTHER_PREFILL if is_same_decode else Rung.OTHER_PAIR
