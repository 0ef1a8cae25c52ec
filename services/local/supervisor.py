"""``baton serve``: starts everything, says when it is ready, restarts what dies, and ends it in order."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from baton.services.core.errors import ConfigurationError
from baton.services.local.banner import banner
from baton.services.local.child import Child, baton_argv
from baton.services.local.cluster import Argv, LocalCluster
from baton.services.local.gateway_client import GatewayUnreachable
from baton.services.local.probes import WorkerProbes
from baton.services.runtime.process import StopSignals
from baton.services.runtime.settings import ServeSettings
from baton.services.runtime.settings_loader import EXIT_BAD_CONFIGURATION, SettingsError
from baton.services.runtime.tls import internal_files

_POLL_S = 0.1
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0
# A process that dies within a minute of its start, again and again, has a cause that starting it does not cure.
_SHORT_LIFE_S = 60.0
_MAX_SHORT_LIVES = 5
# When one process refuses its settings, the others may be about to find more that is wrong.
_MORE_PROBLEMS_S = 1.0
# Beyond its own drain time: closing, and the interpreter's end.
_END_GRACE_S = 10.0
_NATS_END_S = 5.0


class ClusterFailed(Exception):
    """It cannot be kept running."""


class Supervisor:
    """Runs a LocalCluster. ``start``, then ``wait_failed`` as long as it should run, then ``end`` in every case."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ending = False
        self._began_s = time.monotonic()

    async def start(self) -> list[dict[str, Any]]:
        """Returns the workers' descriptions when all are ready. Raises SettingsError if a process refuses its settings."""
        cluster = self._cluster
        await cluster.nats.start()
        self.say(f"NATS is ready on {cluster.nats.url}")
        cluster.make_children()
        names = ", ".join(child.name for child in cluster.children())
        self.say(f"starting {names}; {cluster.threads_per_worker} CPU thread(s) per worker")
        for child in cluster.children():
            await child.start()
            self._tasks.append(asyncio.create_task(self._keep(child), name=f"keep-{child.name}"))
        self._tasks.append(asyncio.create_task(self._keep_nats(), name="keep-nats"))
        probes = WorkerProbes(
            lambda: cluster.workers,
            self._ask,
            unresponsive_after_s=cluster.settings.replace_unresponsive_after_s,
            say=self.say,
            tls=internal_files(cluster.settings),
        )
        self._tasks.append(asyncio.create_task(probes.run(), name="probe-workers"))
        ready = asyncio.create_task(self._until_ready())
        try:
            await asyncio.wait((ready, self._failure), return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            return ready.result()
        finally:
            ready.cancel()

    async def wait_failed(self) -> None:
        """Raises when the installation cannot be kept running."""
        await asyncio.shield(self._failure)

    async def end(self, timeout_s: float) -> None:
        """Drains the gateway, so that nothing new comes, then the workers, then NATS. Each gets ``timeout_s``."""
        self._ending = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        cluster = self._cluster
        try:
            if cluster.gateway is not None:
                await cluster.gateway.end(timeout_s)
            await asyncio.gather(*(worker.end(timeout_s) for worker in cluster.workers))
            await cluster.nats.child.end(min(timeout_s, _NATS_END_S))
        finally:
            for child in (*cluster.children(), cluster.nats.child):
                child.kill()
            if self._failure.done():
                self._failure.exception()  # it was told of, or is not news any more

    def say(self, text: str) -> None:
        """Tells people at the terminal what goes on."""
        sys.stderr.write(f"[{time.monotonic() - self._began_s:6.1f} s] {text}\n")
        sys.stderr.flush()

    async def _until_ready(self) -> list[dict[str, Any]]:
        wanted = set(self._cluster.worker_ids)
        told: set[str] = set()
        while True:
            workers = await asyncio.to_thread(self._ask)
            ready = {worker["id"] for worker in workers if worker["state"] == "ready"}
            for worker_id in sorted(ready - told):
                self.say(f"{worker_id} is ready")
            told |= ready
            if wanted <= ready and await asyncio.to_thread(self._is_gateway_ready):
                return [worker for worker in workers if worker["id"] in wanted]
            await asyncio.sleep(_POLL_S)

    def _ask(self) -> list[dict[str, Any]]:
        try:
            answer = self._cluster.client.get("/v1/workers")
        except GatewayUnreachable:
            return []
        return list(answer.body["data"]) if answer.status == 200 else []

    def _is_gateway_ready(self) -> bool:
        try:
            return self._cluster.client.get("/ready").status == 200
        except GatewayUnreachable:
            return False

    async def _keep(self, child: Child) -> None:
        """Starts ``child`` again whenever it ends, unless it refused its settings or dies too often."""
        num_short_lives = 0
        while True:
            started_s = time.monotonic()
            status = await child.wait()
            if status == EXIT_BAD_CONFIGURATION:
                await asyncio.sleep(_MORE_PROBLEMS_S)
                self._fail(SettingsError(self._problems() or [f"{child.name} refused to start"]))
                return
            num_short_lives = num_short_lives + 1 if time.monotonic() - started_s < _SHORT_LIFE_S else 0
            if num_short_lives > _MAX_SHORT_LIVES:
                self._fail(
                    ClusterFailed(
                        f"{child.name} {_ended(status)}, {num_short_lives} times within a minute of its start"
                    )
                )
                return
            backoff_s = min(_FIRST_BACKOFF_S * 2 ** max(0, num_short_lives - 1), _MAX_BACKOFF_S)
            self.say(f"{child.name} {_ended(status)}; starting it again in {backoff_s:.1f} s")
            await asyncio.sleep(backoff_s)
            await child.start()

    async def _keep_nats(self) -> None:
        """On the same port, so that everybody finds it again; nothing that it held is missed."""
        nats = self._cluster.nats
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_s = time.monotonic()
            status = await nats.child.wait()
            if time.monotonic() - started_s > _SHORT_LIFE_S:
                backoff_s = _FIRST_BACKOFF_S
            self.say(f"NATS {_ended(status)}; serving goes on; starting it again in {backoff_s:.1f} s")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            try:
                await nats.start()
            except ConfigurationError as error:
                self.say(error.message)

    def _problems(self) -> list[str]:
        """What the children said, once each, without the names of the children."""
        lines = [line for child in self._cluster.children() for line in child.take_problems()]
        return list(dict.fromkeys(line.partition(": ")[2] for line in lines))

    def _fail(self, error: Exception) -> None:
        if not self._failure.done() and not self._ending:
            self._failure.set_exception(error)


def serve(settings: ServeSettings, *, argv: Argv = baton_argv) -> int:
    """Runs until a signal; returns the exit status. ``argv`` makes the command lines of the processes."""
    return asyncio.run(_serve(settings, argv))


async def _serve(settings: ServeSettings, argv: Argv) -> int:
    with StopSignals() as signals:
        cluster = LocalCluster(settings, argv=argv)
        supervisor = Supervisor(cluster)
        try:
            status = await _run_until_signal(supervisor, cluster, signals)
        finally:
            drained = await _end(supervisor, signals, settings.drain_timeout_s)
            cluster.remove_files()
        return status if drained or signals.last_signal is None else 128 + signals.last_signal


async def _run_until_signal(supervisor: Supervisor, cluster: LocalCluster, signals: StopSignals) -> int:
    stopping = asyncio.create_task(signals.drain.wait())
    try:
        starting = asyncio.create_task(supervisor.start())
        if await _first_is_done(starting, stopping):
            print(banner(cluster.settings, starting.result()), flush=True)
            failing = asyncio.create_task(supervisor.wait_failed())
            if await _first_is_done(failing, stopping):
                failing.result()
        return 0
    except ClusterFailed as error:
        sys.stderr.write(f"baton serve: {error}; stopping\n")
        return 1
    finally:
        stopping.cancel()


async def _end(supervisor: Supervisor, signals: StopSignals, drain_timeout_s: float) -> bool:
    """Drains and stops. False when a (or another) signal cut it short."""
    hurry = signals.stop_now if signals.drain.is_set() else signals.drain
    if signals.drain.is_set():
        supervisor.say(f"draining for up to {drain_timeout_s:.0f} s; Ctrl-C again to stop now")
    ending = asyncio.create_task(supervisor.end(drain_timeout_s + _END_GRACE_S))
    hurrying = asyncio.create_task(hurry.wait())
    drained = await _first_is_done(ending, hurrying)
    hurrying.cancel()
    return drained


async def _first_is_done(first: asyncio.Task[Any], second: asyncio.Task[Any]) -> bool:
    """Waits for either; cancels ``first`` if it was not the one."""
    await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
    if first.done():
        return True
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    return False


def _ended(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
