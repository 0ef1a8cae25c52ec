"""A worker's process: one host at a time, whose role can change while the process lives.

What a role is: the policy by which a worker schedules, the service that gateways call, and what it says of itself. Model and
address belong to the process. A change of role ends one host and begins another: what runs is finished first, the new host is a
new incarnation under the same id, so that whatever was meant for the old one is refused by the fences that are there anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from baton.services.core.router import Role
from baton.services.decode.__main__ import DecodeHost
from baton.services.engine.loader import LoadedModel
from baton.services.prefill.__main__ import PrefillHost
from baton.services.runtime.main import run_service
from baton.services.runtime.settings import WorkerSettings
from baton.services.worker.environment import Environment
from baton.services.worker.host import WorkerHost
from baton.services.worker.watchdog import end_process

log = structlog.get_logger(__name__)


class WorkerProcess:
    """See ``runtime.main.Service``."""

    def __init__(
        self,
        settings: WorkerSettings,
        end: Callable[[int], None] | None = end_process,
        load: Callable[[], LoadedModel] | None = None,
    ) -> None:
        """``end``: how a stuck worker ends the process; None: nobody watches. ``load`` replaces the model folder."""
        self._end = end
        self._load = load
        self._wanted: asyncio.Queue[tuple[Role, float]] = asyncio.Queue()
        self._change: asyncio.Task[None] | None = None
        self.host = self._make_host(settings)

    async def start(self) -> None:
        await self.host.start()

    async def wait_failed(self) -> None:
        """Changes the role meanwhile, whenever that is asked for."""
        while True:
            failing = asyncio.ensure_future(self.host.wait_failed())
            wanted = asyncio.ensure_future(self._wanted.get())
            try:
                await asyncio.wait((failing, wanted), return_when=asyncio.FIRST_COMPLETED)
                if failing.done():
                    return failing.result()
            finally:
                failing.cancel()
                wanted.cancel()
            self._change = asyncio.create_task(self._become(*wanted.result()), name="change-role")
            await asyncio.shield(self._change)  # a signal ends the waiting, not what is half done

    async def drain(self) -> None:
        if self._change is not None:
            await asyncio.wait((self._change,))
        await self.host.drain()

    async def stop(self) -> None:
        if self._change is not None:
            self._change.cancel()
            await asyncio.gather(self._change, return_exceptions=True)
        await self.host.stop()

    def _want(self, role: Role, timeout_s: float) -> None:
        self._wanted.put_nowait((role, timeout_s))

    async def _become(self, role: Role, timeout_s: float) -> None:
        before = self.host
        if role.value == before.settings.role:
            return
        log.info("changing role", worker_id=before.identity.worker_id, before=before.settings.role, role=role.value)
        await before.drain_within(timeout_s)
        loaded, port = before.loaded, before.port
        await before.stop()
        update = {"role": role.value, "worker_id": before.identity.worker_id, "port": port}
        self._load = lambda: loaded  # the weights are the same
        self.host = self._make_host(before.settings.model_copy(update=update))
        await self.host.start()

    def _make_host(self, settings: WorkerSettings) -> WorkerHost[Any]:
        make = PrefillHost if settings.role == Role.PREFILL.value else DecodeHost
        environment = Environment(end_process=self._end, change_role=self._want)
        return make(settings, load=self._load, environment=environment)


def run(settings: WorkerSettings) -> int:
    """Serves until a signal and returns the exit status."""
    return run_service(settings.role, settings, lambda: WorkerProcess(settings))
