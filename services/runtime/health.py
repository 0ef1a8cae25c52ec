"""Liveness and readiness, the same for gRPC probes and for REST.

The gRPC health service answers for two names: "" (the process works) and "ready" (it takes new work).
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

READY_SERVICE = "ready"
SERVICE_NAME = health.SERVICE_NAME

_Status = health_pb2.HealthCheckResponse


class Health:
    """What this process says of itself. Made and used on the event loop's thread."""

    def __init__(self) -> None:
        self._servicer: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._is_alive = True
        self._not_ready_reason: str | None = "starting"
        self._is_draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._publish()

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    @property
    def is_ready(self) -> bool:
        return self._is_alive and self._not_ready_reason is None

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        return "" if self.is_ready else self._not_ready_reason or "not alive"

    def set_ready(self) -> None:
        """Takes new work from now on. Nothing brings back a process that drains."""
        if not self._is_draining:
            self._not_ready_reason = None
            self._publish()

    def set_not_ready(self, reason: str) -> None:
        if not self._is_draining:
            self._not_ready_reason = reason
            self._publish()

    def set_draining(self) -> None:
        """Takes no new work any more; comes before the first request is turned away, so that others stop sending in time."""
        self._is_draining = True
        self._not_ready_reason = "draining"
        self._publish()

    def set_dead(self, reason: str) -> None:
        """The process cannot go on (its step loop stopped, say): whoever watches should restart it."""
        self._is_alive = False
        self._not_ready_reason = reason
        self._publish()

    def add_to(self, server: Any) -> None:
        """Adds the standard health service to a gRPC server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def _publish(self) -> None:
        task = asyncio.get_running_loop().create_task(self._tell_watchers())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_watchers(self) -> None:
        for service, is_serving in (("", self.is_alive), (READY_SERVICE, self.is_ready)):
            await self._servicer.set(service, _Status.SERVING if is_serving else _Status.NOT_SERVING)
