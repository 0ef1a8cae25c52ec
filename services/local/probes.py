"""Asks the workers of a local installation for their health, and kills those that cannot answer or say that they are dead.

Whoever ends by itself is the supervisor's business. A worker is asked from the moment when the gateway knows it, so never
while it loads its model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.services.local.child import Child
from baton.services.runtime.tls import CHANNEL_OPTIONS, TLSFiles, channel_credentials

_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 2.0
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
# Fewer silent probes may be our own fault: this process may have been stopped in between.
_MIN_SILENT_PROBES = 2


class WorkerProbes:
    """``run`` it as a task."""

    def __init__(
        self,
        workers: Callable[[], list[Child]],
        describe: Callable[[], list[dict[str, Any]]],
        *,
        unresponsive_after_s: float,
        say: Callable[[str], None],
        every_s: float = _EVERY_S,
        tls: TLSFiles | None = None,
    ) -> None:
        """``describe`` blocks and returns what the gateway knows of the workers; nothing when it does not answer.
        ``unresponsive_after_s``: 0 spares those that only do not answer."""
        self._workers = workers
        self._describe = describe
        self._unresponsive_after_s = unresponsive_after_s
        self._say = say
        self._every_s = every_s
        self._tls = tls
        self._addresses: dict[int, str] = {}  # by pid
        self._silent: dict[int, tuple[float, int]] = {}  # by pid: since when, and how many probes
        self._dead: set[int] = set()  # pids that have said once that they cannot go on

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            # What was known stays known while the gateway is away. A pid tells one process of a name from the next.
            for row in await asyncio.to_thread(self._describe):
                self._addresses[row["pid"]] = row["address"]
            running = {child.pid: child for child in self._workers() if child.is_running and child.pid is not None}
            for known in (self._addresses, self._silent):
                for pid in known.keys() - running.keys():
                    del known[pid]
            self._dead &= running.keys()
            probes: list[Awaitable[None]] = [
                self._probe(child, pid, self._addresses[pid])
                for pid, child in running.items()
                if pid in self._addresses
            ]
            await asyncio.gather(*probes)

    async def _probe(self, child: Child, pid: int, address: str) -> None:
        try:
            # Not with the options of other channels, which soon stop waiting for a process that is stopped.
            async with self._open_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # Nobody listens there: it is ending, and the supervisor will hear of it.
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._on_silence(child, pid)
            return
        self._silent.pop(pid, None)
        if answer.status != health_pb2.HealthCheckResponse.NOT_SERVING:
            self._dead.discard(pid)
        elif pid in self._dead:
            self._replace(child, "says that it cannot go on")
        else:
            self._dead.add(pid)  # it dumps its stacks and ends by itself; only one that does not is killed

    def _open_channel(self, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        return grpc.aio.secure_channel(address, channel_credentials(self._tls), options=[*_OPTIONS, *CHANNEL_OPTIONS])

    def _on_silence(self, child: Child, pid: int) -> None:
        now_s = time.monotonic()
        since_s, count = self._silent.get(pid, (now_s - _ANSWER_TIMEOUT_S, 0))
        self._silent[pid] = (since_s, count + 1)
        silent_s = now_s - since_s
        if 0 < self._unresponsive_after_s <= silent_s and count + 1 >= _MIN_SILENT_PROBES:
            self._replace(child, f"has not answered for {silent_s:.0f} s")

    def _replace(self, child: Child, why: str) -> None:
        self._say(f"{child.name} {why}; killing it")
        child.kill()
