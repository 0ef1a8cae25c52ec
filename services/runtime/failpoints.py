"""Failpoints at work: what happens at a point that has a rule. Off, which is the default, a point costs one comparison.

Only a process whose listeners are on loopback may be started with them; ``settings.Settings.failpoints`` sees to that. See
``core.failpoints`` for the rules, and the service ``baton.api.worker.v1.FailpointService`` for changing them at run time.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import grpc.aio
import structlog

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.kvtransfer import failpoint as transfer_failpoint
from baton.kvtransfer.failpoint import TransferFailpoint
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.failpoints import Action, Failpoints, Rule, parse_failpoints
from baton.services.runtime.grpc import service_names

_log = structlog.get_logger(__name__)

# What a process that crashes at a failpoint leaves behind: no signal, and no status that anything else here exits with.
CRASH_STATUS = 86
_RELEASE_POLL_S = 0.05


class FailpointReached(BatonError):
    """What ``raise`` raises: another attempt may succeed."""

    def __init__(self, point: str) -> None:
        super().__init__(ErrorCode.INTERNAL, f"failpoint {point}", retryable=True)


class _Active:
    """The rules in force, from one setting of them to the next."""

    def __init__(self, rules: Iterable[Rule], worker_id: str) -> None:
        self.failpoints = Failpoints(rules, worker_id)
        self.released = threading.Event()  # they were set anew: what hangs goes on
        self._lock = threading.Lock()

    def decide(self, point: str, token_ids: Callable[[], Iterable[int]] = tuple) -> Rule | None:
        with self._lock:
            rule = self.failpoints.reach(point, token_ids)
        if rule is not None:
            _log.warning("failpoint", point=point, action=rule.action.value)
            if rule.action is Action.CRASH:
                os._exit(CRASH_STATUS)
        return rule


_active: _Active | None = None


def set_failpoints(rules: Sequence[Rule], worker_id: str = "") -> None:
    """From now on these rules, and only these, are in force in this process; what hangs at a point goes on."""
    global _active
    previous, _active = _active, _Active(rules, worker_id)
    transfer_failpoint.hook = partial(reach, error=TransferFailpoint)
    transfer_failpoint.async_hook = partial(reach_async, error=TransferFailpoint)
    if previous is not None:
        previous.released.set()


def clear_failpoints() -> None:
    """Off again, as at the start of a process."""
    global _active
    previous, _active = _active, None
    transfer_failpoint.hook = transfer_failpoint.async_hook = None
    if previous is not None:
        previous.released.set()


def reach(
    point: str,
    token_ids: Callable[[], Iterable[int]] = tuple,
    error: Callable[[str], BaseException] = FailpointReached,
) -> None:
    """The code is at ``point``, working on requests with ``token_ids``. ``error`` makes what ``raise`` raises.

    Waiting blocks the thread: on the event loop that stops everything, which is what such a test is about.
    """
    if _active is None:
        return
    active = _active
    rule = active.decide(point, token_ids)
    if rule is None:
        return
    match rule.action:
        case Action.RAISE:
            raise error(point)
        case Action.DELAY:
            time.sleep(rule.delay_s)
        case Action.HANG:
            active.released.wait()


async def reach_async(point: str, error: Callable[[str], BaseException] = FailpointReached) -> None:
    """``reach`` for a coroutine: it alone waits, not the loop."""
    if _active is None:
        return
    active = _active
    rule = active.decide(point)
    if rule is None:
        return
    match rule.action:
        case Action.RAISE:
            raise error(point)
        case Action.DELAY:
            await asyncio.sleep(rule.delay_s)
        case Action.HANG:
            while not active.released.is_set():  # noqa: ASYNC110  set on any thread
                await asyncio.sleep(_RELEASE_POLL_S)


def enable_failpoints(text: str, server: grpc.aio.Server, worker_id: str = "") -> Sequence[str]:
    """For a process that was started with failpoints: sets them, serves FailpointService, and returns its full name.

    Raises ValueError for text that is not understood.
    """
    set_failpoints(parse_failpoints(text), worker_id)
    _log.warning("failpoints are on: this process fails when it is told to", failpoints=text)
    worker_pb2_grpc.add_FailpointServiceServicer_to_server(_FailpointServicer(worker_id), server)
    return [name for name in service_names(worker_pb2.DESCRIPTOR) if name.endswith(".FailpointService")]


class _FailpointServicer(worker_pb2_grpc.FailpointServiceServicer):
    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    async def SetFailpoints(
        self, request: worker_pb2.SetFailpointsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.SetFailpointsResponse:
        try:
            rules = parse_failpoints(request.failpoints)
        except ValueError as error:
            raise BatonError(ErrorCode.INVALID_REQUEST, str(error), param="failpoints") from None
        previous = _active
        set_failpoints(rules, self._worker_id)
        num_reached = previous.failpoints.num_reached if previous is not None else {}
        return worker_pb2.SetFailpointsResponse(num_reached=num_reached)
