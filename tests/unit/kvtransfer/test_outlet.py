"""The sending end of a connection whose other end does not read, or reads late."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.frames import FrameKind
from baton.kvtransfer.transport.outlet import BlockPush, Outlet, _Batch
from baton.kvtransfer.transport.shm import ShmTransport
from baton.kvtransfer.transport.stream import FrameStream, Outgoing
from baton.kvtransfer.transport.tcp import TcpTransport

# Larger than any socket buffer, so that sending it has to wait for the reader.
BLOCK = 16 * 1024 * 1024
FENCES = (b"a" * 16, b"b" * 16)
TOKEN = bytes(32)


@dataclass
class Events:
    """Writes down what the outlet reports."""

    sent: list[tuple[bytes, tuple[int, ...]]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unreachable: list[TransferCode] = field(default_factory=list)

    def on_sent(self, fence: bytes, blocks: tuple[tuple[int, int], ...]) -> None:
        self.sent.append((fence, tuple(index for index, _ in blocks)))

    def on_verdicts(self, fence: bytes, landed: tuple[int, ...], corrupt: tuple[int, ...]) -> None:
        pass

    def on_gone(self, fence: bytes, code: TransferCode, reason: str) -> None:
        pass

    def on_link_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def on_unreachable(self, code: TransferCode, reason: str) -> None:
        self.unreachable.append(code)


@dataclass
class Bench:
    """An outlet, and the socket that its bytes arrive at."""

    outlet: Outlet
    events: Events
    memory: HostBlockMemory
    arrived: socket.socket

    async def read(self, num_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        parts: list[bytes] = []
        while num_bytes:
            parts.append(await asyncio.wait_for(loop.sock_recv(self.arrived, min(num_bytes, 1 << 20)), 10))
            assert parts[-1], "the connection ended"
            num_bytes -= len(parts[-1])
        return b"".join(parts)

    async def read_frame(self) -> tuple[frames.Header, bytes]:
        """A header, and all that follows it."""
        header = frames.parse_header(await self.read(frames.HEADER_BYTES))
        body = await self.read(header.body_bytes)
        return header, body + await self.read(header.count * BLOCK if header.kind is FrameKind.BLOCKS else 0)


def push(index: int, block_id: int) -> BlockPush:
    return BlockPush(Slot(index, 100 + index, 1), block_id)


@asynccontextmanager
async def bench(
    transport: type[TcpTransport] | type[ShmTransport] = TcpTransport, **options: float
) -> AsyncIterator[Bench]:
    memory, executor, events = HostBlockMemory(3, BLOCK), ThreadPoolExecutor(1), Events()
    for row in range(3):
        memory.rows.row(row)[:] = random.Random(row).randbytes(1 << 16) * (BLOCK >> 16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        outlet = Outlet(
            server.getsockname(),
            pair_fence=bytes(16),
            data_token=TOKEN,
            transport=transport(memory, executor),
            memory=memory,
            executor=executor,
            events=events,
            options=TransferOptions(**options),
        )
        await outlet.connect()
        arrived, _ = await asyncio.get_running_loop().sock_accept(server)
        with arrived:
            arrived.setblocking(False)
            setup = Bench(outlet, events, memory, arrived)
            assert (await setup.read_frame())[0].kind is FrameKind.HELLO
            yield setup
            await outlet.close()
        executor.shutdown()
        memory.close()


async def test_a_block_larger_than_every_buffer_arrives_whole() -> None:
    async with bench() as setup:
        setup.outlet.push(FENCES[0], TOKEN, [push(0, 2), push(1, 0)])
        for block_id in (2, 0):
            header, rest = await setup.read_frame()
            assert header.count == 1
            assert rest[-BLOCK:] == bytes(setup.memory.rows.row(block_id))
        await eventually(lambda: setup.events.sent == [(FENCES[0], (0,)), (FENCES[0], (1,))])


async def test_a_block_whose_sending_was_cancelled_half_way_is_let_go_at_once_and_the_stream_stays_in_step() -> None:
    async with bench() as setup:
        setup.outlet.push(FENCES[0], TOKEN, [push(0, 1)])
        setup.outlet.push(FENCES[0], TOKEN, [push(1, 1)])
        setup.outlet.push(FENCES[1], TOKEN, [push(0, 2)])
        await eventually(lambda: setup.outlet._sending, what="a frame that the socket took a part of")
        quiet: list[bool] = []
        setup.outlet.cancel(FENCES[0], lambda: quiet.append(True))
        assert quiet == [True]
        setup.memory.rows.row(1)[:] = b"\xff" * BLOCK  # somebody else's block by now
        header, rest = await setup.read_frame()
        assert header.fence == FENCES[0]
        assert b"\xff" * 64 not in rest[-BLOCK:]
        assert rest.endswith(bytes(1 << 20))
        header, rest = await setup.read_frame()
        assert header.fence == FENCES[1]
        assert rest[-BLOCK:] == bytes(setup.memory.rows.row(2))
        await eventually(lambda: setup.events.sent == [(FENCES[1], (0,))])


async def test_a_peer_that_stops_reading_is_given_up() -> None:
    async with bench(stall_s=0.2) as setup:
        setup.outlet.push(FENCES[0], TOKEN, [push(0, 1)])
        await eventually(lambda: setup.events.lost)
        assert "no byte moved" in setup.events.lost[0]
        assert setup.events.sent == []


async def test_closing_while_a_peer_does_not_read_does_not_wait_for_it() -> None:
    async with bench() as setup:
        setup.outlet.push(FENCES[0], TOKEN, [push(0, 1), push(1, 2)])
        await eventually(lambda: setup.outlet._sending)
        await asyncio.wait_for(setup.outlet.close(), 5)
        assert setup.events == Events()


async def test_an_address_without_a_listener_is_told() -> None:
    async with bench() as setup:
        setup.outlet.address = ("127.0.0.1", 1)
        with pytest.raises(TransferError, match=r"data plane 127\.0\.0\.1:1"):
            await setup.outlet.connect()


async def test_blocks_are_told_in_the_order_in_which_they_left() -> None:
    """A commit follows the last one: one that was told out of turn would end the handoff without the others' checksums."""
    async with bench() as setup:
        whole, rest = _Batch(FENCES[0], TOKEN, [push(0, 0)]), _Batch(FENCES[0], TOKEN, [push(1, 1)])
        whole.frame, whole.sent = Outgoing(b""), ((0, 11),)
        whole.frame.advance(0)  # nothing of it is left
        rest.frame, rest.sent = Outgoing(b"the socket has room for this by now"), ((1, 12),)
        stream = setup.outlet._stream
        assert stream is not None
        setup.outlet._conclude(stream, [whole, rest])
        assert setup.events.sent == [(FENCES[0], (0,)), (FENCES[0], (1,))]


async def test_no_verdict_is_heard_before_the_sending_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver may be faster than the thread that sends: its verdict waits until the thread is done."""
    async with bench(ShmTransport) as setup:
        heard: list[str] = []
        monkeypatch.setattr(setup.events, "on_verdicts", lambda *_: heard.append("verdict"))
        monkeypatch.setattr(setup.events, "on_sent", lambda *_: heard.append("sent"))
        hash_and_send, is_answered = setup.outlet._hash_and_send, threading.Event()

        def slowly(stream: FrameStream, batches: list[_Batch]) -> None:
            hash_and_send(stream, batches)
            is_answered.wait(30)

        monkeypatch.setattr(setup.outlet, "_hash_and_send", slowly)
        setup.outlet.push(FENCES[0], TOKEN, [push(0, 2)])
        reading = asyncio.create_task(setup.read_frame())
        await eventually(lambda: setup.outlet._reading and setup.outlet._reading[0].frame)
        setup.arrived.send(frames.pack_verdicts(FENCES[0], (0,), ()))
        for _ in range(20):  # turns of the event loop, in which the verdict would be read
            await asyncio.sleep(0)
        assert heard == []
        is_answered.set()
        await reading
        await eventually(lambda: len(heard) == 2)
        assert heard == ["sent", "verdict"]
