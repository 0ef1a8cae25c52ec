"""A simulated worker machine: the production process around the simulated engine, started and ended as a supervisor does it."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable
from typing import Any

from helpers.simulation.bus import BusServer, SimBus
from helpers.simulation.checks import check_turn
from helpers.simulation.clock import Process
from helpers.simulation.model import BLOCK_BYTES, BLOCK_SIZE, LOADED, SimEngine, SimMemory
from helpers.simulation.network import Network
from helpers.simulation.rpc import SimChannel
from helpers.simulation.rpc_server import SimServer
from helpers.simulation.sockets import SimSockets
from pydantic import ByteSize

from baton.kvtransfer.memory import BlockMemory
from baton.services.core.scheduler.base import ScheduledRequest
from baton.services.core.watchdog import Pulse, Watchdog, WatchdogLimits
from baton.services.decode.__main__ import DecodeHost
from baton.services.engine.engine import Engine
from baton.services.engine.loader import LoadedModel
from baton.services.prefill.__main__ import PrefillHost
from baton.services.runtime.bus import Bus
from baton.services.runtime.grpc import ErrorInterceptor
from baton.services.runtime.settings import WorkerSettings
from baton.services.worker.environment import Environment
from baton.services.worker.host import WorkerHost
from baton.services.worker.step_loop import StepLoop
from baton.services.worker.worker import Worker

CLUSTER = "sim"
STOP_TIMEOUT_S = 10.0
WATCH_EVERY_S = 0.5


class VirtualStepLoop(StepLoop[Any]):
    """The turns of the production loop, on the virtual clock: a step takes what the engine says that it costs."""

    _engine: Any

    def start(self) -> None:
        self._call_came: asyncio.Future[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._take_turns(), name="step")

    @property
    def is_alive(self) -> bool:
        return not self._task.done()

    async def stop(self) -> None:
        self._is_closed = True
        self._put(None)
        await asyncio.wait([self._task], timeout=8.0)

    def _put(self, call: Callable[[], None] | None) -> None:
        super()._put(call)
        if self._call_came is not None and not self._call_came.done():
            self._call_came.set_result(None)

    def begin_step(self) -> list[ScheduledRequest] | None:
        batch = super().begin_step()
        if batch is not None:
            self._engine.problems += check_turn(self._scheduler, batch, self._clock())
        return batch

    async def _take_turns(self) -> None:
        while not self._is_stopping:
            batch = self.begin_step()
            if batch is not None:
                await self._wait_for_engine(batch)
                self.end_step(self._compute(batch))
            elif not self._is_stopping:
                await self._await_call()

    async def _wait_for_engine(self, batch: list[ScheduledRequest]) -> None:
        left_s = self._engine.cost_s(batch)
        while left_s > 0 or self._engine.hangs:
            await asyncio.sleep(min(left_s, 1.0) if left_s > 0 else 1.0)
            left_s -= 1.0

    async def _await_call(self) -> None:
        if not self._inbox.empty():
            return
        loop = asyncio.get_running_loop()
        self._call_came = loop.create_future()
        timer = loop.call_later(0.25, _wake, self._call_came)
        await self._call_came
        timer.cancel()
        self._call_came = None


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Machine:
    """What the host's own loading is replaced with."""

    engine: SimEngine
    memory: SimMemory
    end_process: Callable[[], None]

    def _lay_out(self, loaded: LoadedModel, num_blocks: int, block_bytes: int) -> tuple[Engine, BlockMemory]:
        assert (num_blocks, block_bytes) == (self.memory.num_blocks, BLOCK_BYTES)
        return self.engine, self.memory  # type: ignore[return-value]

    def _watch(self, worker: Worker[Any], engine: Engine) -> None:
        """The thread that watches is a task here; it decides as in production, and ends the process."""
        watching = asyncio.get_running_loop().create_task(self._look(worker), name="watchdog")
        self._stack.callback(watching.cancel)  # type: ignore[attr-defined]

    async def _look(self, worker: Worker[Any]) -> None:
        loop, steps = asyncio.get_running_loop(), worker.steps
        watchdog = Watchdog(WatchdogLimits(self.settings.stuck_after_s), WATCH_EVERY_S)  # type: ignore[attr-defined]
        for beats in itertools.count():
            pulse = Pulse(steps.num_turns, beats, steps.is_alive, worker.expected_step_s())
            reason = watchdog.look(pulse, loop.time())
            if reason is not None:
                self._health.set_dead(reason)  # type: ignore[attr-defined]
                await asyncio.sleep(WATCH_EVERY_S)
                self.end_process()
            await asyncio.sleep(WATCH_EVERY_S)


class _SimPrefillHost(_Machine, PrefillHost):
    pass


class _SimDecodeHost(_Machine, DecodeHost):
    pass


@functools.cache
def _base_settings(role: str) -> WorkerSettings:
    """Reading settings takes longer than many a run."""
    return WorkerSettings(role=role, cluster=CLUSTER, nats_url="none", block_size=BLOCK_SIZE)  # type: ignore[arg-type]


class SimWorker:
    """One machine with one worker on it, over all of its starts."""

    def __init__(
        self,
        role: str,
        index: int,
        *,
        network: Network,
        bus: BusServer,
        sockets: SimSockets,
        num_blocks: int,
        step_s: float,
        token_s: float,
        settings: dict[str, Any],
    ) -> None:
        self.role = role
        self.name = f"{role}-{index}"
        ip = f"127.0.{1 if role == 'prefill' else 2}.{index + 1}"
        network.hosts[ip] = self.name
        self.num_starts = 0
        self.num_blocks = num_blocks
        self.process: Process | None = None
        self.host: WorkerHost[Any] | None = None
        self.is_ready = False
        self._network = network
        self._bus = bus
        self._sockets = sockets
        self._cost = (step_s, token_s)
        self.turn_problems: list[str] = []
        self._stop_signal: asyncio.Event | None = None
        kv_cache_memory = ByteSize(num_blocks * BLOCK_BYTES)
        own = {"worker_id": self.name, "host": ip, "kv_cache_memory": kv_cache_memory, **settings}
        self._settings = _base_settings(role).model_copy(update=own)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive

    @property
    def engine(self) -> SimEngine:
        assert self.host is not None
        return self.host.engine  # type: ignore[attr-defined, no-any-return]

    def start(self) -> None:
        """A new process."""
        self.num_starts += 1
        self.is_ready = False
        self.process = Process(self._network.loop, self.name, self.num_starts)
        self.host = None
        self._network.trace.note(self.process, "starts")
        self.process.run(self._main(self.process))

    async def _main(self, process: Process) -> None:
        network, loop = self._network, self._network.loop
        offset_s = network.rng.uniform(0.0, 1e6)  # monotonic clocks of machines have nothing in common
        environment = Environment(
            clock=lambda: loop.time() + offset_s,
            new_incarnation=lambda: f"{process.number:03d}-{self.name}".ljust(32, "0"),
            create_server=lambda: SimServer(network, [ErrorInterceptor()]),  # type: ignore[arg-type, return-value]
            open_channel=lambda address: SimChannel(network, address),  # type: ignore[arg-type, return-value]
            sockets=self._sockets,
            step_loop=VirtualStepLoop,
        )
        make = _SimPrefillHost if self.role == "prefill" else _SimDecodeHost
        bus: Bus = SimBus(self._bus)
        host = make(self._settings, load=lambda: LOADED, bus=bus, environment=environment)
        host.memory = SimMemory(self.num_blocks)
        host.end_process = self.kill
        host.engine = SimEngine(host.memory, *self._cost, problems=self.turn_problems)
        self.host = host
        self._stop_signal = asyncio.Event()
        await host.start()
        self.is_ready = True
        failing = loop.create_task(host.wait_failed())
        asked = loop.create_task(self._stop_signal.wait())
        await asyncio.wait([failing, asked], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            try:
                async with asyncio.timeout(self._settings.drain_timeout_s):
                    await host.drain()
            except TimeoutError:
                pass
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await host.stop()
                await bus.close()
        except TimeoutError:
            pass
        network.trace.note(process, "exits")
        self.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        if self.process is not None and self._stop_signal is not None:
            self._network.loop.call_soon(self._stop_signal.set, context=self.process.context)

    def kill(self, *, power: bool = True) -> None:
        """SIGKILL; with ``power`` off the machine says no last word either."""
        if self.process is not None and self.process.is_alive:
            self.process.kill()
            self._network.killed(self.process, power=power)
            self.is_ready = False

    def pause(self) -> None:
        if self.process is not None and self.process.is_alive:
            self.process.pause()
            self._network.paused(self.process)

    def wake(self) -> None:
        if self.process is not None and self.process.is_alive:
            self.process.wake()
            self._network.woken(self.process)
