"""Does to a running world what its scenario says, and undoes it."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from typing import TYPE_CHECKING

from helpers.simulation.clock import Process
from helpers.simulation.scenario import Fault
from helpers.simulation.worker import SimWorker

if TYPE_CHECKING:
    from helpers.simulation.world import World

# A supervisor starts a process again after this.
RESTART_S = 0.5


class Injector:
    """All faults of one run. ``counts``: those that hit something."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.counts: Counter[str] = Counter()
        self.hung: set[str] = set()  # machines whose engine hung
        self._awaited: list[Fault] = []
        self._undo: dict[int, tuple[str, object]] = {}
        self._is_over = False  # whatever was planned for later does not happen

    def plan(self, start_s: float) -> None:
        loop = self._world.loop
        for fault in self._world.scenario.faults:
            if fault.on:
                self._awaited.append(fault)
            else:
                loop.call_at(start_s + fault.at_s, self._inject, fault)
        if self._awaited:
            self._world.network.on_message = self._on_message
        loop.call_later(RESTART_S, self._supervise)

    def _on_message(self, name: str, source: Process, target: Process) -> None:
        for fault in [fault for fault in self._awaited if fault.on == name]:
            fault.nth -= 1
            if fault.nth > 0:
                continue
            self._awaited.remove(fault)
            ends = (source.host, target.host) if fault.hits_source else (target.host, source.host)
            fault.target, fault.other = ends if ends[0] != "gateway" else (ends[1], ends[0])
            self._world.loop.call_later(fault.later_s, self._inject, fault, context=contextvars.Context())

    def _supervise(self) -> None:
        """Starts again what ended although nobody asked for it, as the supervisor of an installation does."""
        world = self._world
        for worker in world.workers:
            if not worker.is_alive and worker.name not in self._down:
                worker.start()
        world.loop.call_later(RESTART_S, self._supervise)

    @property
    def _down(self) -> set[str]:
        return {str(target) for kind, target in self._undo.values() if kind == "down"}

    def _inject(self, fault: Fault) -> None:
        world = self._world
        if self._is_over:
            return
        world.trace.note("fault", f"{fault.kind} {fault.target} {fault.other} {fault.lasts_s} x{fault.count}")
        self.counts[fault.kind] += 1
        getattr(self, f"_do_{fault.kind}")(fault, None if fault.kind == "gateway" else world.worker(fault.target))

    def _later(self, fault: Fault, undo: str, target: object) -> None:
        """Undone when its time is over, or at the end of the load."""
        key = len(self._undo) + sum(self.counts.values()) * 1000
        self._undo[key] = (undo, target)
        if fault.lasts_s is not None:
            self._world.loop.call_later(fault.lasts_s, self._undo_one, key)

    def _undo_one(self, key: int) -> None:
        entry = self._undo.pop(key, None)
        if entry is None:
            return
        undo, target = entry
        world, network = self._world, self._world.network
        world.trace.note("fault", f"over: {undo} {target if isinstance(target, (str, list)) else ''}")
        match undo:
            case "down":
                network.power_on(str(target))
                if str(target) == "gateway":
                    world.gateway.start()
                elif not world.worker(str(target)).is_alive:
                    world.worker(str(target)).start()
            case "paused":
                assert isinstance(target, SimWorker)
                target.wake()
            case "blocked":
                network.unblock(target)  # type: ignore[arg-type]
            case "bus_down":
                world.bus.start()
            case "bus_cut":
                world.bus.heal(str(target))
            case "bus_loss":
                world.bus.loss = 0.0
            case "slow":
                target.slowness = 1.0  # type: ignore[attr-defined]
            case "slow_link":
                network.slowness.clear()

    async def heal(self) -> None:
        """Undoes everything that still is."""
        self._is_over = True
        self._world.sockets.damage.clear()
        for key in list(self._undo):
            self._undo_one(key)
        for worker in self._world.workers:
            if worker.is_alive and worker.host is not None:
                worker.engine.hangs = False
                worker.engine.failures = 0
        await asyncio.sleep(0)

    # What each kind does.

    def _do_crash(self, fault: Fault, worker: SimWorker) -> None:
        self._later(fault, "down", worker.name)
        worker.kill()

    def _do_power(self, fault: Fault, worker: SimWorker) -> None:
        self._later(fault, "down", worker.name)
        worker.kill(power=False)

    def _do_drain(self, fault: Fault, worker: SimWorker) -> None:
        self._later(fault, "down", worker.name)
        worker.terminate()

    def _do_pause(self, fault: Fault, worker: SimWorker) -> None:
        if worker.is_alive:
            worker.pause()
            self._later(fault, "paused", worker)

    def _do_block(self, fault: Fault, worker: SimWorker) -> None:
        ways = [(fault.target, fault.other), (fault.other, fault.target)]
        if fault.count == 2:
            ways = ways[:1]  # one direction alone
        self._world.network.block(ways)
        self._later(fault, "blocked", ways)

    def _do_block_data(self, fault: Fault, worker: SimWorker) -> None:
        self._do_block(fault, worker)

    def _do_reset(self, fault: Fault, worker: SimWorker) -> None:
        for _ in range(fault.count):
            self._world.network.reset(fault.target, fault.other, kinds=("rpc", "data"))

    def _harm(self, fault: Fault, kind: str) -> None:
        for way in ((fault.target, fault.other), (fault.other, fault.target)):
            self._world.sockets.damage.setdefault(way, []).extend([kind] * fault.count)

    def _do_flip(self, fault: Fault, worker: SimWorker) -> None:
        self._harm(fault, "flip")

    def _do_cut(self, fault: Fault, worker: SimWorker) -> None:
        self._harm(fault, "cut")

    def _do_double(self, fault: Fault, worker: SimWorker) -> None:
        self._harm(fault, "double")

    def _do_bus_down(self, fault: Fault, worker: SimWorker) -> None:
        self._world.bus.stop()
        self._later(fault, "bus_down", "nats")

    def _do_bus_cut(self, fault: Fault, worker: SimWorker) -> None:
        host = fault.other if fault.count == 2 else fault.target
        self._world.bus.cut(host)
        self._later(fault, "bus_cut", host)

    def _do_bus_loss(self, fault: Fault, worker: SimWorker) -> None:
        self._world.bus.loss = 0.3
        self._later(fault, "bus_loss", "nats")

    def _do_slow(self, fault: Fault, worker: SimWorker) -> None:
        if worker.is_alive and worker.host is not None:
            worker.engine.slowness = 20.0 * fault.count
            self._later(fault, "slow", worker.engine)

    def _do_slow_link(self, fault: Fault, worker: SimWorker) -> None:
        self._world.network.slowness[fault.target, fault.other] = 100.0
        self._later(fault, "slow_link", "")

    def _do_raise(self, fault: Fault, worker: SimWorker) -> None:
        if worker.is_alive and worker.host is not None:
            worker.engine.failures = min(2, fault.count)

    def _do_hang(self, fault: Fault, worker: SimWorker) -> None:
        if worker.is_alive and worker.host is not None:
            worker.engine.hangs = True
            self.hung.add(worker.name)

    def _do_gateway(self, fault: Fault, worker: SimWorker | None) -> None:
        if self._world.gateway.is_alive:
            self._later(fault, "down", "gateway")
            self._world.gateway.kill()
            for client in self._world.clients:
                client.gateway_lost()
