"""The one way in which a service starts, serves, drains and ends."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import structlog

from baton.services.core.errors import ConfigurationError
from baton.services.runtime.process import StopSignals
from baton.services.runtime.settings import Settings
from baton.services.runtime.settings_loader import report_problems
from baton.services.runtime.telemetry import configure_logging

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

# Closing sockets and telling peers; a service that takes longer is cut off.
_STOP_TIMEOUT_S = 10.0
# What was cut off may clean up after itself; then the process ends, whatever hangs: a thread, or the event loop.
_END_TIMEOUT_S = 20.0


class Service(Protocol):
    """A process's content. The methods are called once each, in this order, on the event loop."""

    async def start(self) -> None:
        """Loads, binds and begins to serve. ConfigurationError ends the process with one line and status 2."""
        ...

    async def wait_failed(self) -> None:
        """Returns (or raises) only when the service cannot go on: its step loop died, say."""
        ...

    async def drain(self) -> None:
        """Takes nothing new and returns when what is running has ended. May be cancelled when its time is over."""
        ...

    async def stop(self) -> None:
        """Gives up what is left and releases everything. Also called after a failed or interrupted start."""
        ...


def run_service(name: str, settings: Settings, make_service: Callable[[], Service]) -> int:
    """Runs a service until a signal or a failure and returns the exit status: 0 after a drain, 1 after a failure,
    2 for settings that cannot be served, 128 + signal when a second signal cut the drain short. The caller ends the process
    with it: it ends by itself soon after."""
    configure_logging(name, level=settings.log_level, log_format=settings.log_format)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_run(make_service, settings.drain_timeout_s))
    except ConfigurationError as error:
        return report_problems(name, error)


async def _run(make_service: Callable[[], Service], drain_timeout_s: float) -> int:
    with StopSignals() as signals:
        service = make_service()
        if not await _start(service, signals):
            # Weights may still be loading in a thread, which cannot be interrupted; nothing is being served yet.
            _log.info("stopped while starting")
            await _stop(service)
            _exit_now(0)
        _rest_collector()
        _log.info("started")
        status = 1
        try:
            if not await _serve(service, signals):
                status = await _drain(service, signals, drain_timeout_s)
            return status
        finally:
            _end_at_the_latest(status)
            await _stop(service)
            gc.unfreeze()  # or libraries complain at the end of what was never freed


def _rest_collector() -> None:
    """What is there when serving begins stays. To look through all of it would stop every stream for a tenth of a second, again
    and again. Starting went without it (``process.start_without_collector``)."""
    gc.collect()
    gc.freeze()
    gc.enable()


async def _start(service: Service, signals: StopSignals) -> bool:
    """False when a signal came first."""
    try:
        return await _unless(service.start(), signals.drain)
    except BaseException:
        await _stop(service)
        raise


async def _serve(service: Service, signals: StopSignals) -> bool:
    """True when the service failed, False when it was asked to stop."""
    try:
        if not await _unless(service.wait_failed(), signals.drain):
            return False
    except Exception:
        _log.exception("service failed")
    else:
        _log.error("service failed")
    return True


async def _drain(service: Service, signals: StopSignals, timeout_s: float) -> int:
    _log.info("draining", timeout_s=timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            finished = await _unless(service.drain(), signals.stop_now)
    except TimeoutError:
        _log.warning("drain timed out; giving up what is left", timeout_s=timeout_s)
        return 0
    if not finished and signals.last_signal is not None:
        _log.warning("second signal; stopping now")
        return 128 + signals.last_signal
    _log.info("drained")
    return 0


async def _stop(service: Service) -> None:
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await service.stop()
    except Exception:
        _log.exception("stopping failed")


def _end_at_the_latest(status: int) -> None:
    """Whoever called for the end of this process does not wait for ever. Nothing cancels this: the process is over."""
    timer = threading.Timer(_END_TIMEOUT_S, _exit_now, (status,))
    timer.daemon = True
    timer.start()


async def _unless(work: Awaitable[_T], event: asyncio.Event) -> bool:
    """Awaits ``work`` and returns True; or, if ``event`` is set first, cancels it and returns False."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        await task
        return True
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed: a message to a worker and back takes about 15% less time than on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _exit_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
