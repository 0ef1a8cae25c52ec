"""Warnings that come again and again: one line in a while, with how many there were."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

_log = structlog.get_logger(__name__)

# A peer with the wrong certificate, for one, tries again and again.
_SAY_EVERY_S = 10.0
# Who is refused chooses the keys; the oldest make room.
_MAX_KEYS = 256


class Sparingly:
    """Logs a warning about one key, a peer for example, at most every few seconds, and how many there were in between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # key -> when, and how many since

    def warn(self, event: str, key: str, **details: Any) -> None:
        now_s = self._clock()
        said_s, num_unsaid = self._said.get(key, (-_SAY_EVERY_S, 0))
        if now_s - said_s < _SAY_EVERY_S:
            self._said[key] = (said_s, num_unsaid + 1)
            return
        if len(self._said) >= _MAX_KEYS and key not in self._said:
            del self._said[next(iter(self._said))]
        self._said[key] = (now_s, 0)
        _log.warning(event, **details, **({"unsaid": num_unsaid} if num_unsaid else {}))
