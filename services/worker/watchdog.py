"""The thread that watches step thread and event loop, and ends the process when either is stuck, so that it is replaced.

It needs neither of them: it runs when both are stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

import structlog

from baton.services.core.watchdog import Pulse, Watchdog, WatchdogLimits

log = structlog.get_logger(__name__)

# What a process exits with that its own watchdog has ended.
STUCK_STATUS = 87
_LOOK_EVERY_S = 0.25
_BEAT_EVERY_S = 0.5
# Between saying that it is dead and being dead: peers and probes that ask just then are told.
_LAST_WORDS_S = 0.5


def end_process(status: int) -> None:
    """At once and whatever hangs: no thread is waited for."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


class WatchdogThread:
    """Watches from ``start`` to ``stop``. ``on_stuck`` is told first, on the event loop, if that still turns."""

    def __init__(
        self,
        limits: WatchdogLimits,
        *,
        loop: asyncio.AbstractEventLoop,
        num_turns: Callable[[], int],
        is_thread_alive: Callable[[], bool],
        expected_step_s: Callable[[], float | None],
        on_stuck: Callable[[str], None],
        end: Callable[[int], None] = end_process,
    ) -> None:
        self._watchdog = Watchdog(limits, _LOOK_EVERY_S)
        self._loop = loop
        self._num_turns = num_turns
        self._is_thread_alive = is_thread_alive
        self._expected_step_s = expected_step_s
        self._on_stuck = on_stuck
        self._end = end
        self._num_beats = 0
        self._stopping = threading.Event()
        self._beating: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """On the event loop."""
        self._beating = asyncio.create_task(self._beat(), name="watchdog-beat")
        self._thread.start()

    def stop(self) -> None:
        """Before the step thread is ended on purpose. Does not wait."""
        self._stopping.set()
        if self._beating is not None:
            self._beating.cancel()

    async def _beat(self) -> None:
        while True:
            self._num_beats += 1
            await asyncio.sleep(_BEAT_EVERY_S)

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S):
            pulse = Pulse(self._num_turns(), self._num_beats, self._is_thread_alive(), self._expected_step_s())
            reason = self._watchdog.look(pulse, time.monotonic())
            if reason is not None and not self._stopping.is_set():
                self._give_up(reason)
                return

    def _give_up(self, reason: str) -> None:
        log.error("stuck: this process ends, so that it is replaced", reason=reason, status=STUCK_STATUS)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._on_stuck, reason)
        # On the descriptor itself: what hangs may hold the lock of a stream.
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        self._stopping.wait(_LAST_WORDS_S)
        self._end(STUCK_STATUS)
