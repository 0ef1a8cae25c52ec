"""Tells a link on which nothing arrives from one that is only slow: blocks were pushed, and nothing was heard since.

A black hole takes what is sent and gives nothing back: no connection breaks, and every frame has left. Only verdicts are
progress, and what counts is time that was seen to pass without any, so that a process that was stopped and woken does not
blame the link.
"""

from __future__ import annotations

from collections.abc import Collection


class VerdictWatch:
    """Of one link. ``look`` is called every ``every_s`` as long as there is something to wait for."""

    def __init__(self, silent_s: float, every_s: float) -> None:
        self._silent_s = silent_s
        self._longest_gap_s = 2 * every_s
        self._waiting: dict[bytes, set[int]] = {}  # by fence: blocks without a verdict
        self._still_s = 0.0
        self._last_s: float | None = None

    @property
    def num_blocks(self) -> int:
        """Pushed, and without a verdict."""
        return sum(map(len, self._waiting.values()))

    def pushed(self, fence: bytes, indices: Collection[int]) -> None:
        if not self._waiting:
            self._still_s, self._last_s = 0.0, None
        self._waiting.setdefault(fence, set()).update(indices)

    def judged(self, fence: bytes, indices: Collection[int]) -> None:
        """A verdict on these blocks came."""
        self._still_s = 0.0
        if (waiting := self._waiting.get(fence)) is not None:
            waiting.difference_update(indices)
            if not waiting:
                del self._waiting[fence]

    def is_doubtful(self, fence: bytes) -> bool:
        """Asked when the receiver lacks blocks of the handoff: whether they seem to have gone into a black hole."""
        return fence in self._waiting and self._still_s >= self._silent_s / 4

    def dropped(self, fence: bytes) -> None:
        """The handoff no longer waits."""
        self._waiting.pop(fence, None)

    def clear(self) -> None:
        """The link is gone, and what was under way with it."""
        self._waiting.clear()

    def look(self, needed_s: float, now: float) -> float | None:
        """For how long the link has been silent, if that is too long. ``needed_s``: what a verdict may take to come."""
        seen_s = 0.0 if self._last_s is None else min(now - self._last_s, self._longest_gap_s)
        self._last_s = now
        if not self._waiting:
            return None
        self._still_s += seen_s
        return self._still_s if self._still_s > self._silent_s + needed_s else None
