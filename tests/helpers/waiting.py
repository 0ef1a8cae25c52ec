"""Waiting for a condition without guessing how long it takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_POLL_S = 0.01


async def eventually(condition: Callable[[], object], *, timeout_s: float = 10.0, what: str = "the condition") -> None:
    """Returns as soon as ``condition`` holds; fails the test when it does not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout_s:.0f} s"
        await asyncio.sleep(_POLL_S)


def eventually_sync(condition: Callable[[], object], *, timeout_s: float = 10.0, what: str = "the condition") -> None:
    """The same outside an event loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout_s:.0f} s"
        time.sleep(_POLL_S)
