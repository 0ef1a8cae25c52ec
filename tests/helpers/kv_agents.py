"""Transfer agents as two workers have them: real memory, sockets and gRPC server, and a small host that plays the worker."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import grpc.aio
import pytest
import torch
from helpers.host_cuda import HostCuda

from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.layout import Compatibility, KVLayout
from baton.kvtransfer.memory import BlockMemory, HostBlockMemory
from baton.kvtransfer.messages import FirstToken, Slot, TransferReport
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.protocol import HandoffLimits
from baton.kvtransfer.sending import HandoffSpec, SenderHandoff
from baton.kvtransfer.staging import StagedBlockMemory
from baton.kvtransfer.transport import cuda_runtime
from baton.kvtransfer.transport.tls import TLSSockets
from baton.services.runtime.grpc import bind_server, create_channel, create_internal_server, create_server
from baton.services.runtime.tls import TLSFiles
from baton.services.worker.environment import data_plane_identity

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")
COMPATIBILITY = Compatibility("model", LAYOUT)
FIRST_TOKEN = FirstToken(7, -0.5, ((7, -0.5), (9, -1.5)))
NUM_BLOCKS = 32


@dataclass
class Host:
    """Plays the worker on the receiving side: hands out blocks, and writes down what it is told."""

    num_blocks: int
    already_here: set[bytes] = field(default_factory=set)
    refuse: TransferError | None = None
    refuse_commit: TransferError | None = None
    room: asyncio.Event = field(default_factory=asyncio.Event)
    slots: dict[HandoffKey, tuple[Slot, ...]] = field(default_factory=dict)
    commits: dict[HandoffKey, tuple[FirstToken, TransferReport]] = field(default_factory=dict)
    releases: list[tuple[HandoffKey, TransferCode, bool]] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)  # indices that were whole although their handoff failed
    cancelled: list[HandoffKey] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    generations: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.num_blocks))
        random.Random(1).shuffle(self.free)
        self.room.set()

    async def reserve(
        self, key: HandoffKey, sender: WorkerIdentity, block_names: Sequence[bytes], num_tokens: int
    ) -> Sequence[Slot]:
        try:
            await self.room.wait()
        except asyncio.CancelledError:
            self.cancelled.append(key)
            raise
        if self.refuse is not None:
            raise self.refuse
        slots = []
        for index, name in enumerate(block_names):
            if name not in self.already_here:
                block_id = self.free.pop()
                self.generations[block_id] = self.generations.get(block_id, 0) + 1
                slots.append(Slot(index, block_id, self.generations[block_id]))
        self.slots[key] = tuple(slots)
        return slots

    async def committed(self, key: HandoffKey, first_token: FirstToken, report: TransferReport) -> None:
        if self.refuse_commit is not None:
            raise self.refuse_commit
        self.commits[key] = (first_token, report)

    async def released(self, key: HandoffKey, error: TransferError, quiet: bool, verified: Sequence[int] = ()) -> None:
        self.releases.append((key, error.code, quiet))
        self.verified += verified
        if quiet:
            self.free += [slot.block_id for slot in self.slots.pop(key)]


@dataclass
class Node:
    """One worker process's part in transfers."""

    agent: TransferAgent
    memory: BlockMemory
    host: Host
    address: str
    server: grpc.aio.Server

    @property
    def identity(self) -> WorkerIdentity:
        return self.agent.identity

    def fill(self, seed: int) -> None:
        """Random bytes in every block."""
        rng = random.Random(seed)
        for block_id in range(self.memory.num_blocks):
            self.write(block_id, rng.randbytes(self.memory.block_bytes))

    def write(self, block_id: int, data: bytes) -> None:
        """As an engine would: into the cache, wherever it is."""
        if isinstance(self.memory, StagedBlockMemory):
            _bytes_of(self.memory, block_id).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        else:
            self.memory.rows.row(block_id)[:] = data

    def block(self, block_id: int) -> bytes:
        if isinstance(self.memory, StagedBlockMemory):
            return _bytes_of(self.memory, block_id).cpu().numpy().tobytes()
        return bytes(self.memory.rows.row(block_id))

    def contents(self) -> list[bytes]:
        return [self.block(block_id) for block_id in range(self.memory.num_blocks)]


def _bytes_of(memory: StagedBlockMemory, block_id: int) -> torch.Tensor:
    return memory._cache[block_id].view(-1).view(torch.uint8)


def cache_device() -> str:
    """Where a cache is that is not read and written in place: on the GPU, or without one in host memory like a GPU's."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_staged_memory(num_blocks: int, layout: KVLayout = LAYOUT) -> StagedBlockMemory:
    """A cache with rows for all of it in both directions."""
    cache = torch.zeros((num_blocks, *layout.block_shape), dtype=getattr(torch, layout.dtype), device=cache_device())
    return StagedBlockMemory(cache, 2 * num_blocks)


def options(**changes: Any) -> TransferOptions:
    """Short waits; ``limits`` may be given as a dict."""
    limits = HandoffLimits(**{"patience_s": 0.3, **changes.pop("limits", {})})
    # Without canaries: many tests count what goes over a connection from its first byte on.
    defaults = {
        "canary_bytes": 0,
        "expect_wait_s": 5.0,
        "hello_timeout_s": 0.3,
        "close_timeout_s": 2.0,
        "rpc_timeout_s": 5.0,
    }
    return TransferOptions(limits=limits, **{**defaults, **changes})


@asynccontextmanager
async def running(
    worker_id: str,
    *,
    incarnation: str = "1" * 32,
    address: str = "127.0.0.1:0",
    tls: TLSFiles | None = None,
    num_blocks: int = NUM_BLOCKS,
    **agent_options: Any,
) -> AsyncIterator[Node]:
    """An agent behind a gRPC server of its own."""
    compatibility: Compatibility = agent_options.pop("compatibility", COMPATIBILITY)
    is_on_device = agent_options.get("transports") == "cuda_ipc"
    memory: BlockMemory = agent_options.pop("memory", None) or (
        make_staged_memory(num_blocks, compatibility.layout)
        if is_on_device
        else HostBlockMemory(num_blocks, compatibility.layout.block_bytes)
    )
    host = Host(memory.num_blocks)
    agent_options.setdefault("options", options())
    if tls is not None:
        agent_options.setdefault("open_channel", partial(create_channel, tls=tls))
        agent_options.setdefault("sockets", TLSSockets(data_plane_identity(tls)))
    open_runtime = HostCuda if is_on_device and cache_device() == "cpu" else cuda_runtime.open_runtime
    with patch.object(cuda_runtime, "open_runtime", open_runtime):
        agent = TransferAgent(WorkerIdentity(worker_id, incarnation), compatibility, memory, host, **agent_options)
    server = create_server() if tls is None else create_internal_server(tls)
    agent.add_to_server(server)
    host_name, _, wanted_port = address.rpartition(":")
    port = bind_server(server, host_name, int(wanted_port), tls)
    await agent.start()
    await server.start()
    try:
        yield Node(agent, memory, host, f"127.0.0.1:{port}", server)
    finally:
        await agent.close()
        await server.stop(None)
        memory.close()


@asynccontextmanager
async def two_nodes(transport: str = "tcp", **agent_options: Any) -> AsyncIterator[tuple[Node, Node]]:
    """A sender with random blocks and a receiver with other ones."""
    async with (
        running("prefill-0", transports=transport, **agent_options) as sender,
        running("decode-0", transports=transport, **agent_options) as receiver,
    ):
        sender.fill(1)
        receiver.fill(2)
        yield sender, receiver


@dataclass
class Prompt:
    """One prompt to hand over: its blocks are ``block_ids`` of the sender."""

    block_ids: list[int]
    request_id: str = "req"
    attempt: int = 1
    done: list[TransferError | None] = field(default_factory=list)

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.request_id, self.attempt)

    @property
    def names(self) -> list[bytes]:
        return [block_id.to_bytes(16, "little") for block_id in self.block_ids]

    @property
    def all_ready(self) -> dict[int, int]:
        return dict(enumerate(self.block_ids))

    def spec(self, receiver: Node, **changes: Any) -> HandoffSpec:
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "attempt": self.attempt,
            "receiver": receiver.identity,
            "receiver_address": receiver.address,
            "block_names": self.names,
            "num_tokens": len(self.block_ids) * LAYOUT.block_size - 3,
            "on_done": self.done.append,
        }
        return HandoffSpec(**{**fields, **changes})


def open_handoff(sender: Node, receiver: Node, prompt: Prompt, **changes: Any) -> SenderHandoff:
    """Announced and opened, as the gateway makes the two workers do it."""
    receiver.agent.expect(prompt.key, sender.identity)
    return sender.agent.open(prompt.spec(receiver, **changes))


async def hand_over(sender: Node, receiver: Node, prompt: Prompt) -> TransferReport:
    """All of it, in one go."""
    handoff = open_handoff(sender, receiver, prompt)
    handoff.blocks_ready(prompt.all_ready)
    return await handoff.commit(FIRST_TOKEN)


def assert_arrived(sender: Node, receiver: Node, prompt: Prompt) -> None:
    """Every block that was sent stands in its slot, byte for byte."""
    slots = receiver.host.slots[prompt.key]
    for slot in slots:
        assert receiver.block(slot.block_id) == sender.block(prompt.block_ids[slot.index])


needs_nixl = pytest.mark.skipif(
    find_spec("nixl") is None, reason="nixl is not installed: pip install 'baton-llm[nixl]'"
)

# cuda_ipc runs on a GPU where there is one, else on host memory in its place: all but CUDA itself is tried everywhere.
TRANSPORTS = ["tcp", "shm", "inproc", "cuda_ipc", pytest.param("nixl", marks=needs_nixl)]

each_transport = pytest.mark.parametrize("transport", TRANSPORTS)


async def failure_of(sender: Node, receiver: Node, prompt: Prompt) -> TransferError:
    with pytest.raises(TransferError) as caught:
        await hand_over(sender, receiver, prompt)
    assert prompt.done == [caught.value]
    return caught.value
