"""A simulated gateway machine: registry, discovery, prefix index, dispatcher and receipts, joined as in production."""

from __future__ import annotations

import asyncio
import functools

from helpers.simulation.bus import BusServer, SimBus
from helpers.simulation.clock import Process
from helpers.simulation.network import Network
from helpers.simulation.rpc import SimChannel
from helpers.simulation.worker import CLUSTER

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.router import Placement
from baton.services.gateway.discovery import Discovery
from baton.services.gateway.dispatch import WorkerDispatcher
from baton.services.gateway.receipts import GenerationRecord, ReceiptBook
from baton.services.gateway.registry import Registry
from baton.services.runtime.block_key import read_block_key
from baton.services.runtime.settings import BusSettings
from baton.services.runtime.subjects import Subjects


@functools.cache
def _settings() -> BusSettings:
    return BusSettings(cluster=CLUSTER, nats_url="none")


class SimGateway:
    """One gateway, over all of its starts."""

    name = "gateway"

    def __init__(self, network: Network, bus: BusServer, placement: Placement) -> None:
        self.num_starts = 0
        self.process: Process | None = None
        self.registry: Registry
        self.dispatcher: WorkerDispatcher
        self.prefix_index: PrefixIndex
        self.ended: list[GenerationRecord] = []
        self._network = network
        self._bus = bus
        self._placement = placement
        network.hosts["127.0.0.1"] = self.name

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive

    def start(self) -> None:
        self.num_starts += 1
        self.process = Process(self._network.loop, self.name, self.num_starts)
        self._network.trace.note(self.process, "starts")
        self.process.run(self._main(self.process))

    async def _main(self, process: Process) -> None:
        network, loop = self._network, self._network.loop
        identity = pb.WorkerIdentity(worker_id=self.name, incarnation=f"gateway-{process.number}")
        self.prefix_index = PrefixIndex()
        self.receipts = ReceiptBook(self.ended.append)
        self.registry = Registry(
            identity,
            clock=loop.time,
            on_forget=self.prefix_index.forget,
            open_channel=lambda address: SimChannel(network, address),  # type: ignore[arg-type, return-value]
        )
        self.dispatcher = WorkerDispatcher(
            self.registry,
            self.prefix_index,
            read_block_key(_settings()),
            self.receipts,
            clock=loop.time,
            placement=self._placement,
        )
        bus = SimBus(self._bus)
        Discovery(bus, Subjects(CLUSTER), identity, self.registry, self.prefix_index)
        await bus.start()
        await asyncio.get_running_loop().create_future()  # until it is killed

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive:
            self.process.kill()
            self._network.killed(self.process)
