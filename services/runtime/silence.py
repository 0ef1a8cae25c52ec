"""Notices a peer that says nothing any more: frozen, unplugged, or gone without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# Two sides of a stream promise each other a message at least this often. Whoever does not promise is never found silent.
HEARTBEAT_S = 0.5
HEARTBEAT_METADATA = "baton-heartbeat-ms"
# Of the limit; a stall of this process counts as this much silence.
_TICKS = 10


class Silence:
    """``heard`` for every message; ``until`` returns when none has come for ``limit_s`` while this process was awake."""

    def __init__(self, limit_s: float, peer_heartbeat_s: float, on_suspect: Callable[[], None] = lambda: None) -> None:
        """A peer that promises fewer messages than usual gets more time: three of its intervals at least. ``on_suspect`` is
        called when it begins or ceases to be suspect."""
        self.limit_s = max(limit_s, 3.0 * peer_heartbeat_s)
        self._suspect_s = 0.4 * self.limit_s if peer_heartbeat_s else limit_s
        self._silent_s = 0.0
        self._heard = False
        self._on_suspect = on_suspect

    @property
    def is_suspect(self) -> bool:
        """Silent for longer than it promised: nothing new should be given to it."""
        return self._silent_s > self._suspect_s

    def heard(self) -> None:
        self._heard = True

    async def until(self) -> None:
        """Runs until the peer has been silent for too long."""
        loop = asyncio.get_running_loop()
        tick_s = self.limit_s / _TICKS
        while self._silent_s < self.limit_s:
            self._heard = False
            began_s = loop.time()
            await asyncio.sleep(tick_s)
            # After a stall of our own, what was sent meanwhile is still to be read: the stall is nobody's silence.
            stretch_s = min(loop.time() - began_s, 2.0 * tick_s)
            was_suspect = self.is_suspect
            self._silent_s = 0.0 if self._heard else self._silent_s + stretch_s
            if self.is_suspect is not was_suspect:
                self._on_suspect()
