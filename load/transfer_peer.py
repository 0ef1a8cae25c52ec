"""A receiver in a process of its own, for the transfer benchmarks: grants slots to whoever asks and takes everything over."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass

import grpc.aio
import numpy as np
import torch

from baton.api.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferError
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.layout import Compatibility, KVLayout
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.messages import FirstToken, Slot, TransferReport
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.shape import LinkShape
from baton.kvtransfer.staging import StagedBlockMemory, staging_rows
from baton.services.runtime.cores import num_cores, transfer_threads
from baton.services.runtime.grpc import create_channel, create_server

SENDER = WorkerIdentity("bench-sender", "0" * 32)
RECEIVER = WorkerIdentity("bench-receiver", "1" * 32)

LAYOUTS = {
    "4 KiB": KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, block_size=16, dtype="bfloat16"),
    "6 KiB": KVLayout(num_layers=3, num_kv_heads=1, head_dim=32, block_size=16, dtype="bfloat16"),
    "192 KiB": KVLayout(num_layers=24, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16"),
    "360 KiB": KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16"),
    "1 MiB": KVLayout(num_layers=32, num_kv_heads=8, head_dim=64, block_size=16, dtype="bfloat16"),
}
"""Blocks of 16 tokens in bfloat16; 360 KiB is the 135M Llama shape."""


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """What both processes of a measurement agree on."""

    transport: str
    layout: str  # a key of LAYOUTS
    num_blocks: int
    bytes_per_s: float | None = None  # of the link that is imitated; None: the machine's own
    device: str = "cpu"  # where both caches are

    @property
    def block_bytes(self) -> int:
        return LAYOUTS[self.layout].block_bytes


class Pool:
    """Always gives the same blocks: one handoff at a time."""

    def __init__(self) -> None:
        self._generation = 0

    async def reserve(
        self, key: HandoffKey, sender: WorkerIdentity, block_names: Sequence[bytes], num_tokens: int
    ) -> Sequence[Slot]:
        self._generation += 1
        return [Slot(index, index, self._generation) for index in range(len(block_names))]

    async def committed(self, key: HandoffKey, first_token: FirstToken, report: TransferReport) -> None:
        """Taken over."""

    async def released(self, key: HandoffKey, error: TransferError, quiet: bool, verified: Sequence[int] = ()) -> None:
        """Given up."""


def make_memory(spec: PeerSpec) -> HostBlockMemory | StagedBlockMemory:
    """A cache of random bytes: a page that nobody wrote would be the one zero page."""
    data = np.random.default_rng(1).integers(0, 256, spec.num_blocks * spec.block_bytes, np.uint8)
    if spec.device == "cpu":
        memory = HostBlockMemory(spec.num_blocks, spec.block_bytes)
        memory.tensor.numpy()[: len(data)] = data
        return memory
    layout = LAYOUTS[spec.layout]
    cache = torch.from_numpy(data).view(getattr(torch, layout.dtype)).view(spec.num_blocks, *layout.block_shape)
    return StagedBlockMemory(cache.to(spec.device), staging_rows(spec.num_blocks, spec.block_bytes))


def make_agent(identity: WorkerIdentity, spec: PeerSpec) -> tuple[TransferAgent, HostBlockMemory | StagedBlockMemory]:
    """An agent with memory of its own. Raises TransferError when the transport does not work here."""
    memory = make_memory(spec)
    compatibility = Compatibility("bench", LAYOUTS[spec.layout])
    num_send_threads, num_copy_threads = transfer_threads(num_cores())  # as a worker does
    try:
        agent = TransferAgent(
            identity,
            compatibility,
            memory,
            Pool(),
            transports=spec.transport,
            options=TransferOptions(
                link_shape=LinkShape(spec.bytes_per_s) if spec.bytes_per_s else None,
                num_send_threads=num_send_threads,
                num_copy_threads=num_copy_threads,
            ),
            open_channel=create_channel,
        )
    except TransferError:
        memory.close()
        raise
    return agent, memory


@asynccontextmanager
async def receiver(spec: PeerSpec) -> AsyncIterator[str]:
    """Serves while it is open; the gRPC address."""
    agent, memory = make_agent(RECEIVER, spec)
    server = create_server()
    agent.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await agent.start()
    await server.start()
    # Handoffs are numbered: all that a run will make are announced at once.
    for number in range(10_000):
        agent.expect(HandoffKey(f"bench-{number}", 1), SENDER)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await agent.close()
        await server.stop(0)
        memory.close()


async def receive(spec: PeerSpec) -> None:
    """Serves until standard input ends. The first line of output is the gRPC address."""
    async with receiver(spec) as address:
        print(address, flush=True)
        with rested_collector():
            await asyncio.to_thread(sys.stdin.read)


@contextmanager
def rested_collector() -> Iterator[None]:
    """What is there already is not looked through again and again: as in a worker that serves."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def round_trip_s(address: str, repeats: int = 50) -> float:
    """Median time of an empty gRPC call to the receiver."""
    times = []
    async with create_channel(address) as channel:
        stub = kvtransfer_pb2_grpc.KVTransferServiceStub(channel)
        for _ in range(repeats):
            begin = time.perf_counter()
            try:
                await stub.Heartbeat(kvtransfer_pb2.HeartbeatRequest())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def as_argument(spec: PeerSpec) -> str:
    """For the command line of the receiving process."""
    return json.dumps(asdict(spec))


if __name__ == "__main__":
    asyncio.run(receive(PeerSpec(**json.loads(sys.argv[1]))))
