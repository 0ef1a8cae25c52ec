"""An outlet whose blocks are hashed by several threads: order, and what is cancelled or closed while they are at it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from helpers.kv_hash_gate import HashGate, close_hash_gate
from helpers.waiting import eventually

from baton.kvtransfer.crew import Crew
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.rows import Rows
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.outlet import BlockPush, Outlet
from baton.kvtransfer.transport.shm import ShmTransport
from baton.kvtransfer.transport.tcp import TcpTransport

# So that a block is a piece of its own, and a frame (of 16 MiB, of 4 MiB inline) some of them.
BLOCK = 1024 * 1024
NUM_BLOCKS = 48
FENCES = (b"a" * 16, b"b" * 16)
TOKEN = bytes(32)
WAIT_S = 30


class Events:
    """Writes down what the outlet reports."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, int, int]] = []
        self.ended: list[str] = []

    def on_sent(self, fence: bytes, blocks: tuple[tuple[int, int], ...]) -> None:
        self.sent += [(fence, index, checksum) for index, checksum in blocks]

    def on_verdicts(self, fence: bytes, landed: tuple[int, ...], corrupt: tuple[int, ...]) -> None:
        pass

    def on_gone(self, fence: bytes, code: TransferCode, reason: str) -> None:
        pass

    def on_link_lost(self, reason: str) -> None:
        self.ended.append(reason)

    def on_unreachable(self, code: TransferCode, reason: str) -> None:
        self.ended.append(reason)


@dataclass
class Bench:
    """An outlet, and the socket that its bytes arrive at."""

    outlet: Outlet
    events: Events
    memory: HostBlockMemory
    arrived: socket.socket

    async def read(self, num_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < num_bytes:
            part = await asyncio.wait_for(loop.sock_recv(self.arrived, min(num_bytes - len(data), 1 << 20)), WAIT_S)
            assert part, "the connection ended"
            data += part
        return bytes(data)

    async def read_frame(self) -> tuple[bytes, frames.Blocks, bytes]:
        """Fence, blocks, and their bytes where they follow."""
        header = frames.parse_header(await self.read(frames.HEADER_BYTES))
        blocks = frames.parse_blocks(await self.read(header.body_bytes), BLOCK)
        is_inline = header.kind is frames.FrameKind.BLOCKS
        return header.fence, blocks, await self.read(header.count * BLOCK if is_inline else 0)

    def push(self, fence: bytes, first: int, end: int) -> None:
        self.outlet.push(fence, TOKEN, [BlockPush(Slot(index, 100 + index, 1), index) for index in range(first, end)])


@asynccontextmanager
async def bench(transport: type[TcpTransport] | type[ShmTransport], num_threads: int = 3) -> AsyncIterator[Bench]:
    memory, events = HostBlockMemory(NUM_BLOCKS, BLOCK), Events()
    for row in range(NUM_BLOCKS):
        memory.rows.row(row)[:] = bytes([row + 1]) * BLOCK
    with Crew(num_threads, "test-send") as crew, socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        outlet = Outlet(
            server.getsockname(),
            pair_fence=bytes(16),
            data_token=TOKEN,
            transport=transport(memory, crew),
            memory=memory,
            executor=crew,
            events=events,
            options=TransferOptions(),
        )
        await outlet.connect()
        arrived, _ = await asyncio.get_running_loop().sock_accept(server)
        with arrived:
            arrived.setblocking(False)
            setup = Bench(outlet, events, memory, arrived)
            await setup.read(frames.HEADER_BYTES)  # HELLO
            yield setup
            await outlet.close()
    memory.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> HashGate:
    return close_hash_gate(monkeypatch)


@pytest.mark.parametrize("transport", [ShmTransport, TcpTransport])
async def test_frames_leave_and_are_told_in_their_order(transport: type[TcpTransport] | type[ShmTransport]) -> None:
    async with bench(transport) as setup:
        expected = setup.memory.rows.checksums(range(NUM_BLOCKS))
        setup.push(FENCES[0], 0, 30)
        setup.push(FENCES[1], 30, NUM_BLOCKS)
        seen: list[tuple[bytes, int, int]] = []
        while len(seen) < NUM_BLOCKS:
            fence, blocks, data = await setup.read_frame()
            seen += [(fence, index, checksum) for index, checksum in zip(blocks.indices, blocks.checksums, strict=True)]
            assert data in (b"", b"".join(bytes([index + 1]) * BLOCK for index in blocks.indices))
        assert seen == [(FENCES[index >= 30], index, expected[index]) for index in range(NUM_BLOCKS)]
        await eventually(lambda: setup.events.sent == seen)


async def test_a_handoff_cancelled_while_threads_hash_it_is_quiet_when_the_last_of_them_is_done(gate: HashGate) -> None:
    async with bench(ShmTransport) as setup:
        setup.push(FENCES[0], 0, 2)
        setup.push(FENCES[0], 2, 3)
        setup.push(FENCES[1], 3, 4)
        await eventually(lambda: len(gate.threads) == 3, what="three threads that hash")
        num_running: list[int] = []
        setup.outlet.cancel(FENCES[0], lambda: num_running.append(gate.num_running))
        await asyncio.sleep(0)
        assert num_running == []  # they read its blocks
        gate.is_open.set()
        fence, blocks, _ = await setup.read_frame()
        assert (fence, blocks.indices) == (FENCES[1], (3,))  # none of the cancelled ones was sent
        await eventually(lambda: num_running)
        assert num_running == [0]
        await eventually(lambda: [index for _, index, _ in setup.events.sent] == [3])


async def test_a_sender_that_closes_while_threads_hash_waits_for_them_and_sends_nothing(gate: HashGate) -> None:
    async with bench(TcpTransport) as setup:
        setup.push(FENCES[0], 0, 20)
        await eventually(lambda: len(gate.threads) == 3, what="three threads that hash")
        closing = asyncio.create_task(setup.outlet.close())
        await asyncio.sleep(0)
        assert not closing.done()
        gate.is_open.set()
        await asyncio.wait_for(closing, WAIT_S)
        assert gate.num_running == 0  # so its memory may go
        assert setup.events.sent == []
        assert await asyncio.get_running_loop().sock_recv(setup.arrived, 1) == b""
        assert setup.events.ended == []


async def test_a_checksum_that_fails_on_a_helper_ends_the_link(gate: HashGate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.is_open.set()
    checksums = Rows.checksums

    def fail(rows: Rows, indices: Iterable[int]) -> list[int]:
        if list(indices) == [2]:
            raise MemoryError("no room")
        return checksums(rows, indices)

    monkeypatch.setattr(Rows, "checksums", fail)
    async with bench(ShmTransport) as setup:
        setup.push(FENCES[0], 0, 12)
        await eventually(lambda: setup.events.ended)
        assert "no room" in setup.events.ended[0]
        assert gate.num_running == 0
