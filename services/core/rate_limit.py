"""Amounts per time: a bucket that refills evenly, and a window that starts anew.

Both may be overdrawn by what was let in before.
"""

from __future__ import annotations


class Bucket:
    """``capacity`` per ``period_s``, refilled evenly; full at first. A clock that is set back refills nothing."""

    def __init__(self, capacity: float, period_s: float, now: float) -> None:
        self._capacity = capacity
        self._period_s = period_s
        self._level = capacity
        self._updated_s = now

    def level(self, now: float) -> float:
        """What is left. Below zero: overdrawn."""
        elapsed_s = max(0.0, now - self._updated_s)
        self._level = min(self._capacity, self._level + elapsed_s * self._capacity / self._period_s)
        self._updated_s = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Takes ``amount``, whether it is there or not."""
        self._level = self.level(now) - amount

    def wait_s(self, least: float, now: float) -> float:
        """Seconds until ``least`` is there; 0 if it is. Never more than ``capacity`` can be waited for."""
        lacking = min(least, self._capacity) - self.level(now)
        return max(0.0, lacking * self._period_s / self._capacity)

    def resize(self, capacity: float, now: float) -> None:
        """Another capacity from now on. What was used counts on."""
        self._level = min(capacity, self.level(now) + capacity - self._capacity)
        self._capacity = capacity


class Window:
    """At most ``limit`` in each period, and periods begin at multiples of ``period_s``: with a wall clock, days of UTC."""

    def __init__(self, limit: int, period_s: float) -> None:
        self.limit = limit
        self._period_s = period_s
        self._period = -1
        self._used = 0

    def left(self, now: float) -> int:
        """What is left in this period. Below zero: overdrawn."""
        self._turn(now)
        return self.limit - self._used

    def take(self, amount: int, now: float) -> None:
        """Takes ``amount``, whether it is there or not."""
        self._turn(now)
        self._used += amount

    def next_s(self, now: float) -> float:
        """Seconds until the next period begins."""
        return self._period_s - now % self._period_s

    def _turn(self, now: float) -> None:
        period = int(now // self._period_s)
        if period > self._period:  # a clock that is set back opens no new period
            self._period, self._used = period, 0
