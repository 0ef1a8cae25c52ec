"""The step thread: it alone owns the scheduler, the block pool and the engine, and never waits for a socket.

It meets the event loop in two queues: calls come in and run between steps; events go out through one callback.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import structlog

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import Request
from baton.services.core.scheduler.base import (
    RequestUpdate,
    Reservation,
    ScheduledRequest,
    Scheduler,
    SchedulerOutput,
    StepResult,
)
from baton.services.engine.out_of_memory import is_out_of_memory, release_memory

log = structlog.get_logger(__name__)

SchedulerT = TypeVar("SchedulerT", bound=Scheduler)
Result = TypeVar("Result")

# An engine that fails this many steps in a row is broken, not unlucky.
MAX_FAILED_STEPS = 3
# Deadlines and leases are looked at this often when nothing else happens.
_IDLE_WAKE_S = 0.25
# Less than the process gives its service to stop.
_STOP_TIMEOUT_S = 8.0


class StepEngine(Protocol):
    """What the loop needs of an engine."""

    def step(self, batch: list[ScheduledRequest]) -> StepResult: ...


@dataclass(slots=True)
class StepEvents:
    """What the event loop is told when a step begins (``started``, ``granted``, ``expired``) and when it has ended."""

    started: list[Request] = field(default_factory=list)  # computed for the first time
    granted: list[Reservation] = field(default_factory=list)
    expired: list[Request] = field(default_factory=list)
    updates: list[RequestUpdate] = field(default_factory=list)
    failed: list[tuple[Request, BatonError]] = field(default_factory=list)
    step_s: float = 0.0
    num_prompt_tokens: int = 0
    num_sampled: int = 0
    num_generating: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way."""

    output: SchedulerOutput
    start_s: float
    num_prompt_tokens: int
    num_generating: int


class StepLoop(Generic[SchedulerT]):
    """Runs steps as long as there is work and sleeps otherwise."""

    def __init__(
        self,
        scheduler: SchedulerT,
        engine: StepEngine,
        *,
        loop: asyncio.AbstractEventLoop,
        on_events: Callable[[StepEvents], None],
        on_turn: Callable[[SchedulerT, float], None] = lambda scheduler, now_s: None,
        on_broken: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``on_events`` and ``on_broken`` run on the event loop; ``on_turn`` on the step thread, before every step and when
        there is nothing (more) to do."""
        self._scheduler = scheduler
        self._engine = engine
        self._loop = loop
        self._on_events = on_events
        self._on_turn = on_turn
        self._on_broken = on_broken
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._is_closed = False  # the event loop's: nothing is taken any more
        self._is_stopping = False  # the step thread's
        self._is_broken = False
        self._num_failed_steps = 0
        self._step: _Step | None = None  # what is being computed
        self.num_out_of_memory = 0  # steps that did not fit
        self.num_turns = 0  # grows whenever the thread gets somewhere, also while there is nothing to do

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int] | None:
        """Tokens of prompts, and requests that generate, in the step that is being computed."""
        step = self._step
        return None if step is None else (step.num_prompt_tokens, step.num_generating)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step that it is in and the calls that came before. A stuck one is left behind."""
        self._is_closed = True
        self._put(None)
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)

    def post(self, function: Callable[[SchedulerT], object]) -> None:
        """Runs ``function`` on the step thread before the next step. An exception is logged."""

        def run() -> None:
            try:
                function(self._scheduler)
            except Exception:
                log.exception("a call on the step thread failed")

        self._put(run)

    def call(self, function: Callable[[SchedulerT], Result]) -> asyncio.Future[Result]:
        """Runs ``function`` on the step thread before the next step; the future is what it returns, or raises.

        Calls and posts run in the order in which they were made, awaited or not. The events of a step that follows may be
        told before the caller goes on. Where that matters, see ``tell``.
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        if self._is_closed:
            future.set_exception(BatonError(ErrorCode.DRAINING, "the worker is stopping", retryable=True))
            return future

        def run() -> None:
            try:
                outcome = function(self._scheduler)
            except Exception as error:
                self.tell(_set_exception, future, error)
            else:
                self.tell(_set_result, future, outcome)

        self._put(run)
        return future

    def tell(self, function: Callable[..., object], *arguments: Any) -> None:
        """From the step thread: runs ``function`` on the event loop, after everything that was told before and before
        everything that is told later, the events of the next step among it."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            self._is_stopping = True

    def _put(self, call: Callable[[], None] | None) -> None:
        self._inbox.put(call)

    def _run(self) -> None:
        while not self._is_stopping:
            batch = self.begin_step()
            if batch is not None:
                self.end_step(self._compute(batch))
            elif not self._is_stopping:
                self._wait_for_call()

    def _compute(self, batch: list[ScheduledRequest]) -> StepResult | Exception:
        try:
            return self._engine.step(batch)
        except Exception as error:
            return error

    # A turn. Both halves are the thread's, or whoever's is the place of the thread; ``end_step`` follows every batch.

    def begin_step(self) -> list[ScheduledRequest] | None:
        """Runs the calls that came in and decides a step. None: nothing to compute before a call comes or time has passed."""
        self._take_calls()
        self.num_turns += 1
        now_s = self._clock()
        try:
            self._on_turn(self._scheduler, now_s)
            if self._is_broken or not self._scheduler.has_work:
                return None
            return self._schedule(now_s)
        except Exception as error:
            self._distrust(error)
            return None

    def end_step(self, outcome: StepResult | Exception) -> None:
        """The batch of ``begin_step`` was computed, or failed."""
        assert self._step is not None
        step, self._step = self._step, None
        self.num_turns += 1
        try:
            if isinstance(outcome, Exception):
                self._fail(step.output, outcome)
            else:
                self._record(step, outcome)
        except Exception as error:
            self._distrust(error)

    def _take_calls(self) -> None:
        """Runs the calls that came in."""
        while not self._is_stopping:
            try:
                self._take(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _wait_for_call(self) -> None:
        """Nothing runs: what ends the wait for room or for a transfer comes as a call, or is a deadline."""
        try:
            self._take(self._inbox.get(timeout=_IDLE_WAKE_S))
        except queue.Empty:
            return

    def _take(self, call: Callable[[], None] | None) -> None:
        if call is None:
            self._is_stopping = True
        else:
            call()

    def _schedule(self, now_s: float) -> list[ScheduledRequest] | None:
        output = self._scheduler.schedule(now_s)
        started = [item.request for item in output.scheduled if item.request.first_scheduled_s == now_s]
        if started or output.granted or output.expired:
            self.tell(self._on_events, StepEvents(started, output.granted, output.expired))
        if not output.scheduled:
            return None
        num_generating = sum(item.num_tokens == 1 for item in output.scheduled)
        self._step = _Step(output, now_s, sum(map(_num_prompt_tokens, output.scheduled)), num_generating)
        return output.scheduled

    def _record(self, step: _Step, result: StepResult) -> None:
        self._num_failed_steps = 0
        end_s = self._clock()
        failed = [
            (item.request, result.failed[item.request.request_id])
            for item in step.output.scheduled
            if item.request.request_id in result.failed
        ]
        for request, _ in failed:
            self._scheduler.abort(request.request_id)
        updates = self._scheduler.update(step.output, result, end_s)
        self.tell(
            self._on_events,
            StepEvents(
                updates=updates,
                failed=failed,
                step_s=end_s - step.start_s,
                num_prompt_tokens=step.num_prompt_tokens,
                num_sampled=len(result.sampled),
                num_generating=step.num_generating,
            ),
        )

    def _fail(self, output: SchedulerOutput, error: Exception) -> None:
        """A step that raised: its requests fail, the others go on. After several in a row the worker gives up."""
        if is_out_of_memory(error):
            self.num_out_of_memory += 1
            release_memory(error)
            if len(output.scheduled) > 1:
                self._shrink(output)
                return
        log.error("engine step failed", num_requests=len(output.scheduled), exc_info=error)
        problem = BatonError(ErrorCode.INTERNAL, f"the engine failed: {type(error).__name__}", retryable=True)
        failed = [(item.request, problem) for item in output.scheduled]
        for request, _ in failed:
            self._scheduler.abort(request.request_id)
        self.tell(self._on_events, StepEvents(failed=failed))
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            self._break(f"{self._num_failed_steps} engine steps in a row failed")

    def _shrink(self, output: SchedulerOutput) -> None:
        """The step did not fit: its youngest request goes on elsewhere, and the others try again without it."""
        youngest = max((item.request for item in output.scheduled), key=lambda request: request.arrival_s)
        num_left = len(output.scheduled) - 1
        log.warning("out of memory: a request is given up", request_id=youngest.request_id, num_left=num_left)
        self._scheduler.abort(youngest.request_id)
        problem = BatonError(ErrorCode.INTERNAL, "the engine ran out of memory", retryable=True)
        self.tell(self._on_events, StepEvents(failed=[(youngest, problem)]))

    def _distrust(self, error: Exception) -> None:
        """Not the engine: what is known of the blocks cannot be trusted any more. Calls are answered until the end."""
        if not self._is_broken:
            log.error("the step thread failed", exc_info=error)
        self._break(f"{type(error).__name__} outside the engine")

    def _break(self, reason: str) -> None:
        """No further step: somebody ends the process."""
        if not self._is_broken:
            self._is_broken = True
            self.tell(self._on_broken, reason)


def _num_prompt_tokens(item: ScheduledRequest) -> int:
    start = item.request.num_computed_tokens
    return max(0, min(start + item.num_tokens, item.request.num_prompt_tokens) - start)


def _set_result(future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        future.set_result(outcome)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
