"""What a process owes its parent and its terminal: signals that mean drain and stop, and not outliving the supervisor."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
import time

# Set by a supervisor for its children: they end when that process does.
PARENT_PID_VARIABLE = "BATON_PARENT_PID"

# oneDNN's own cache, and that of the layer through which torch calls it.
_PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_MAX_PRIMITIVES = 128

_PR_SET_PDEATHSIG = 1
_PARENT_POLL_S = 0.5

# Some senders (timeout, some container runtimes) signal the process and its group: one request, two signals.
_SAME_REQUEST_S = 0.5


def bound_primitive_caches() -> None:
    """Keeps torch from holding on to hundreds of megabytes of compiled matrix products. To be called before it is imported.

    Each product is compiled for its number of rows, into a quarter of a megabyte, and each of two caches keeps 1024 of them.
    Prompts come in all lengths, so that they fill over thousands of steps, which looks like a leak. What is kept here
    is enough for the batch sizes of 25 decode steps; compiling one takes about half a millisecond.
    """
    for name in _PRIMITIVE_CACHES:
        os.environ.setdefault(name, str(_MAX_PRIMITIVES))


def die_with_parent() -> None:
    """Ends this process, whatever it does, when the supervisor that started it is gone. Without a supervisor: nothing.

    The kernel does it on Linux, at once, even to a process that runs no Python; a thread that watches the parent's pid
    does it elsewhere. The request survives exec, so a child may call this and then become another program.
    """
    parent = os.environ.get(PARENT_PID_VARIABLE)
    if parent is None:
        return
    parent_pid = int(parent)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before we could ask
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_watch_parent, args=(parent_pid,), name="parent-watch", daemon=True).start()


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


def exit_cleanly_on_signals() -> None:
    """Until a service has handlers of its own (imports alone can take seconds), a signal finds nothing to drain: exit 0."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(0))


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP while entered: the first asks to drain, the second to stop now."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.stop_now = asyncio.Event()
        self.last_signal: signal.Signals | None = None
        self._first_s = 0.0

    def __enter__(self) -> StopSignals:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        now_s = asyncio.get_running_loop().time()
        if not self.drain.is_set():
            self._first_s = now_s
            self.drain.set()
        elif now_s - self._first_s >= _SAME_REQUEST_S:
            self.stop_now.set()
        self.last_signal = signal.Signals(number)


def start_without_collector() -> None:
    """Libraries make many objects while they are imported, and no garbage: looking through all of them again and again takes a
    tenth of a worker's start. What serves turns it on again (``main.run_service``)."""
    gc.disable()
