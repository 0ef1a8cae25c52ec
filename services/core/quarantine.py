"""How much of a pool may be in quarantine, given up but perhaps still written to, before the worker counts as unhealthy.

A little is normal: a transfer that was given up ends a moment later. Much of it, or for long, means writes that do not end,
and a pool that gets smaller unnoticed. Nothing but a new process gets such blocks back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Standing(StrEnum):
    """What a worker is worth, seen from its quarantine."""

    WITHIN = "within"
    OVER = "over"  # takes nothing new; well again as soon as writes end
    LOST = "lost"  # over for so long that it is to be replaced


@dataclass(frozen=True, slots=True)
class QuarantineLimits:
    """``share`` of the pool may be in quarantine, 1.0: any of it. ``replace_after_s``: over that for so long is lost."""

    share: float = 0.1
    replace_after_s: float = 60.0


class QuarantineBudget:
    """Of one pool of ``num_blocks`` blocks. Give it a look about once a second."""

    def __init__(self, num_blocks: int, limits: QuarantineLimits) -> None:
        self.num_blocks = num_blocks
        # Also in the smallest pool one block is not yet a reason to end the process.
        self.max_num_blocks = max(1, int(num_blocks * limits.share))
        self._replace_after_s = limits.replace_after_s
        self._since_s: float | None = None  # over since then
        self._is_lost = False

    def look(self, num_quarantined: int, now: float) -> Standing:
        """Once lost it stays lost: by then others have been told that the worker goes."""
        if num_quarantined <= self.max_num_blocks:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now
        if self._since_s is not None and now - self._since_s >= self._replace_after_s:
            self._is_lost = True
        if self._is_lost:
            return Standing.LOST
        return Standing.WITHIN if self._since_s is None else Standing.OVER

    def explain(self, num_quarantined: int) -> str:
        """In words, for when it is too much."""
        return (
            f"{num_quarantined} of {self.num_blocks} KV blocks are in quarantine, at most {self.max_num_blocks} may be: "
            "transfers that were given up have not ended"
        )
