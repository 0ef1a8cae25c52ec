"""A circuit breaker: stops work from going where it keeps failing, and lets one try through now and then. Pure.

    CLOSED --max_failures in a window--> OPEN --open_s later--> HALF_OPEN --a try succeeds--> CLOSED
                                           ^                        |
                                           +------ it fails --------+

It is never sticky: failures are forgotten with their window, an open breaker lets a try through after ``open_s``, and a try
whose end nobody reports counts as over after ``try_s``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum


class BreakerState(StrEnum):
    """What a breaker lets through."""

    CLOSED = "closed"  # everything
    OPEN = "open"  # nothing
    HALF_OPEN = "half_open"  # one try


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When it opens and for how long. Seconds."""

    max_failures: int = 3
    window_s: float = 30.0  # failures older than this do not count
    open_s: float = 5.0  # the first time; doubled each time that a try fails
    max_open_s: float = 60.0
    try_s: float = 60.0  # a try whose end nobody reports is over after this


class Breaker:
    """One breaker. ``now`` is on any one clock."""

    def __init__(self, limits: BreakerLimits | None = None) -> None:
        self._limits = limits or BreakerLimits()
        self._failures: deque[float] = deque()
        self._open_until_s: float | None = None
        self._open_s = self._limits.open_s
        self._try_ends_s = 0.0  # until when a try is under way

    @property
    def is_closed(self) -> bool:
        return self._open_until_s is None

    def state(self, now: float) -> BreakerState:
        if self._open_until_s is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until_s else BreakerState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a try may begin."""
        state = self.state(now)
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and now >= self._try_ends_s)

    def num_failures(self, now: float) -> int:
        """Failures in the window."""
        self._forget(now)
        return len(self._failures)

    def on_try(self, now: float) -> None:
        """A try begins. While half-open it is the only one until its end is reported."""
        if self.state(now) is BreakerState.HALF_OPEN:
            self._try_ends_s = now + self._limits.try_s

    def on_success(self, now: float) -> None:
        """A try came through. One that began before the breaker opened says nothing about what comes now."""
        if self.state(now) is not BreakerState.OPEN:
            self._failures.clear()
            self._open_until_s = None
            self._open_s = self._limits.open_s
            self._try_ends_s = 0.0

    def on_failure(self, now: float) -> None:
        """A try failed."""
        state = self.state(now)
        self._forget(now)
        self._failures.append(now)
        if state is BreakerState.HALF_OPEN:
            self._open_s = min(2 * self._open_s, self._limits.max_open_s)
            self._open(now)
        elif state is BreakerState.CLOSED and len(self._failures) >= self._limits.max_failures:
            self._open(now)

    def on_over(self, now: float) -> None:
        """A try ended without saying anything: its client left, or something else failed."""
        self._try_ends_s = 0.0

    def _open(self, now: float) -> None:
        self._open_until_s = now + self._open_s
        self._try_ends_s = 0.0

    def _forget(self, now: float) -> None:
        while self._failures and self._failures[0] <= now - self._limits.window_s:
            self._failures.popleft()
