"""Conversations as a worker knows them: what a request says of its own, and which are over soonest."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from baton.services.core.cache_share import CacheShare

_SLACK = 64  # entries of a heap that may be out of date, beside as many as are not


@dataclass(frozen=True, slots=True)
class SessionTag:
    """What a request says of its conversation. ``key`` is unique over tenants."""

    key: str
    ttl_s: float  # how long its blocks are kept after its last request


@dataclass(slots=True, eq=False)
class Session:
    """One conversation on one worker."""

    key: str
    ttl_s: float
    share: CacheShare
    expires_s: float = 0.0
    blocks: dict[int, None] = field(default_factory=dict)
    """Blocks that it keeps: its latest chain, then what is left of others."""
    is_known: bool = False
    is_closed: bool = False


class Soonest:
    """Known sessions by the end of their time. A session is pushed whenever that changes; earlier entries do not count."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Session]] = []
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, session: Session) -> None:
        heappush(self._heap, (session.expires_s, self._num_pushed, session))
        self._num_pushed += 1

    def pop(self) -> None:
        heappop(self._heap)

    def first(self) -> Session | None:
        while self._heap:
            expires_s, _number, session = self._heap[0]
            if session.is_known and session.expires_s == expires_s:
                return session
            heappop(self._heap)
        return None

    def compact(self, sessions: dict[str, Session]) -> None:
        """Where most entries do not count any more, leaves one for each of ``sessions``."""
        if len(self._heap) > 2 * len(sessions) + _SLACK:
            self._heap.clear()
            for session in sessions.values():
                self.push(session)
