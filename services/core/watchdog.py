"""Decides whether a worker is stuck: its step thread, its event loop, or both.

What counts is time that the watchdog itself saw pass without progress. A process that was stopped and woken, or that got no
turn on a busy machine, finds that no time was seen, and is not stuck.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WatchdogLimits:
    """``stuck_after_s``: without progress for so long is stuck, unless the step is expected to take long."""

    stuck_after_s: float = 3.5  # found out, said and ended within 5 s
    slack: float = 10.0  # a step may take so many times what it is expected to take
    signs_per_step: int = 1  # signs of life that a step gives, more or less evenly
    unknown_after_s: float = 60.0  # a step of which nobody knows how long it takes: kernels may be compiled for it


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the watchdog looks at. Counters grow with every sign of life; which unit they have does not matter."""

    turns: int  # of the step thread, and signs of life from within a step
    beats: int  # of the event loop
    is_thread_alive: bool
    expected_step_s: float | None  # of the step that is being computed; 0.0 without one, None: nobody knows


class Watchdog:
    """Give it a pulse a few times a second."""

    def __init__(self, limits: WatchdogLimits, every_s: float) -> None:
        self.limits = limits
        self._longest_gap_s = 2 * every_s  # a look that comes later has not seen what was between
        self._last_s: float | None = None
        self._turns = self._beats = -1
        self._steps_still_s = self._loop_still_s = 0.0

    def look(self, pulse: Pulse, now: float) -> str | None:
        """What is wrong, in words, or None."""
        seen_s = 0.0 if self._last_s is None else min(now - self._last_s, self._longest_gap_s)
        self._last_s = now
        self._steps_still_s = 0.0 if pulse.turns != self._turns else self._steps_still_s + seen_s
        self._loop_still_s = 0.0 if pulse.beats != self._beats else self._loop_still_s + seen_s
        self._turns, self._beats = pulse.turns, pulse.beats
        if not pulse.is_thread_alive:
            return "the step thread has ended"
        if self._steps_still_s > self.step_limit_s(pulse.expected_step_s):
            return f"no step ended for {self._steps_still_s:.1f} s"
        if self._loop_still_s > self.limits.stuck_after_s:
            return f"the event loop did not turn for {self._loop_still_s:.1f} s"
        return None

    def step_limit_s(self, expected_step_s: float | None) -> float:
        """How long a step may go without a sign of life that is expected to take so long as a whole.

        Between two of its signs at most as long as the whole, since parts differ; in a step of few parts, more.
        """
        limits = self.limits
        if expected_step_s is None:
            return max(limits.unknown_after_s, limits.stuck_after_s)
        return max(limits.stuck_after_s, max(1.0, limits.slack / limits.signs_per_step) * expected_step_s)
