"""Virtual time: an event loop that never waits, and the simulated processes whose callbacks it runs.

When nothing is ready, time jumps to the next timer. Everything that production code schedules inherits the context in which it
was scheduled, and the context says which process it belongs to: so a killed process is one whose callbacks are dropped, without
any of its clean-up, and a stopped one is one whose callbacks wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from enum import Enum
from typing import Any

_OWNER: contextvars.ContextVar[Process] = contextvars.ContextVar("process")
# A run takes some thousands; more means that something goes round and round.
MAX_CALLBACKS = 300_000


class Stuck(Exception):
    """Nothing can ever happen any more, or far too much happens."""


class State(Enum):
    """What the kernel does with a process."""

    RUNNING = "running"
    PAUSED = "paused"  # SIGSTOP
    DEAD = "dead"


class Process:
    """One process of the system. ``host`` names the machine and stays; ``number`` tells its starts apart."""

    def __init__(self, loop: VirtualLoop, host: str, number: int = 1) -> None:
        self.host = host
        self.number = number
        self.state = State.RUNNING
        self.held: deque[asyncio.Handle] = deque()
        self.context = contextvars.copy_context()
        self.context.run(_OWNER.set, self)
        self._loop = loop

    def __str__(self) -> str:
        return self.host if self.number == 1 else f"{self.host}.{self.number}"

    @property
    def is_alive(self) -> bool:
        return self.state is not State.DEAD

    def run(self, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Runs ``work`` as this process does."""
        return self.context.run(self._loop.create_task, work, name=name or f"{self}-main")

    def pause(self) -> None:
        if self.state is State.RUNNING:
            self.state = State.PAUSED

    def wake(self) -> None:
        """What should have run meanwhile runs now, in the order in which it came."""
        if self.state is State.PAUSED:
            self.state = State.RUNNING
            self._loop.resume(self.held)
            self.held = deque()

    def kill(self) -> None:
        self.state = State.DEAD
        self.held.clear()


def current_process() -> Process:
    """Whose code is running."""
    return _OWNER.get()


def owner() -> Process | str:
    """The same, or the world itself."""
    return _OWNER.get("world")


class _Task(asyncio.Task[Any]):
    """A task that sets hold in the same order in every run: by its number instead of its address."""

    __slots__ = ("_number",)

    def __hash__(self) -> int:
        try:
            return self._number
        except AttributeError:  # while it is being made
            self._number: int = self.get_loop().take_number()  # type: ignore[attr-defined]
            return self._number


class _Future(asyncio.Future[Any]):
    __slots__ = ("_number",)

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(loop=loop)
        self._number = loop.take_number()

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in one fixed order. What a thread does happens at one moment, some time later, in order."""

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._numbers = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._num_timers = 0
        self._watched: dict[int, Watched] = {}
        self.num_callbacks = 0
        self.failures: list[str] = []
        self.ignores_owners = False  # at the end everything may clean up
        self.thread_delay_s: Callable[[], float] = lambda: 0.0
        self._thread_s: dict[Executor, float] = {}  # when each executor's last work is done
        self.set_task_factory(lambda loop, coro, **options: _Task(coro, loop=loop, **options))
        self.set_exception_handler(self._note_failure)

    def take_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def time(self) -> float:
        return self._now

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(self)

    def resume(self, handles: deque[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        if executor is None:
            _do(future, func, args)
            return future
        when = max(self._thread_s.get(executor, 0.0), self._now) + self.thread_delay_s()
        self._thread_s[executor] = when
        self.call_at(when, _do, future, func, args)
        return future

    # What sockets are watched with; see ``sockets``.

    def watch(self, number: int, watched: Watched) -> None:
        self._watched[number] = watched

    def unwatch(self, number: int) -> None:
        self._watched.pop(number, None)

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._watched[fd].on_readable(callback, args, contextvars.copy_context())

    def remove_reader(self, fd: int) -> bool:
        return fd in self._watched and self._watched[fd].on_readable(None, (), None)

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._watched[fd].on_writable(callback, args, contextvars.copy_context())

    def remove_writer(self, fd: int) -> bool:
        return fd in self._watched and self._watched[fd].on_writable(None, (), None)

    # The loop itself.

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is dropped when its time comes."""

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        while timers and timers[0][2]._cancelled:  # type: ignore[attr-defined]
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise Stuck("nothing is left that could happen")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        count = len(ready)
        self.num_callbacks += count
        if self.num_callbacks > MAX_CALLBACKS:
            raise Stuck(f"more than {MAX_CALLBACKS} callbacks")
        for _ in range(count):
            handle = ready.popleft()
            if handle._cancelled:  # type: ignore[attr-defined]
                continue
            owner = handle._context.get(_OWNER)  # type: ignore[attr-defined]
            if owner is None or owner.state is State.RUNNING or self.ignores_owners:
                handle._run()  # type: ignore[attr-defined]
            elif owner.state is State.PAUSED:
                owner.held.append(handle)

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.failures.append(f"{context['message']}: {error!r}" if error is not None else context["message"])

    def _write_to_self(self) -> None:
        """Nobody waits."""


def _do(future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Work that has begun is done although nobody waits for it any more."""
    try:
        result = func(*args)
    except Exception as error:
        if not future.done():
            future.set_exception(error)
    else:
        if not future.done():
            future.set_result(result)


class Watched:
    """Something that the loop watches as it would a descriptor."""

    def on_readable(self, callback: Callable[..., object] | None, args: tuple[Any, ...], context: Any) -> bool:
        raise NotImplementedError

    def on_writable(self, callback: Callable[..., object] | None, args: tuple[Any, ...], context: Any) -> bool:
        raise NotImplementedError
