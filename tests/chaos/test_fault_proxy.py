"""The proxy itself: what passes when nothing is wrong, and that each fault does what it says and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from helpers.fault_proxy import Fault, FaultProxy, fault_on, fault_proxy
from helpers.waiting import eventually

from baton.kvtransfer.messages import Slot
from baton.kvtransfer.transport import frames

LINK = "client>server:*"
BLOCK_BYTES = 100
FENCE, TOKEN = bytes(16), bytes(32)


class Sink:
    """A server that keeps what it gets and answers with what it is told to."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.num_ended = 0
        self.ended_by: Exception | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        try:
            while data := await reader.read(65536):
                self.got += data
        except OSError as error:
            self.ended_by = error
        finally:
            self.num_ended += 1
            writer.close()


@asynccontextmanager
async def behind_proxy(kind: str = "bytes") -> AsyncIterator[tuple[FaultProxy, Sink, asyncio.StreamWriter]]:
    sink = Sink()
    server = await asyncio.start_server(sink.serve, "127.0.0.1", 0)
    async with server, fault_proxy(kind, server.sockets[0].getsockname()) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            yield proxy, sink, writer
        finally:
            writer.close()


def blocks_frame(index: int) -> bytes:
    entry = frames.BlockEntry(Slot(index, index, 1), checksum=index, source_row=0)
    head = frames.pack_blocks(frames.FrameKind.BLOCKS, FENCE, TOKEN, [entry], BLOCK_BYTES)
    return head + bytes([index]) * BLOCK_BYTES


async def test_without_a_fault_everything_passes_both_ways() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        data = bytes(range(256)) * 5000
        writer.write(data)
        await eventually(lambda: len(sink.got) == len(data))
        assert sink.got == data
        assert proxy.num_connections == 1


async def test_a_cut_lets_exactly_so_many_bytes_pass_and_resets_the_connection() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        with fault_on(proxy.board, LINK, cut_after_bytes=1000) as fault:
            writer.write(bytes(5000))
            await eventually(lambda: sink.num_ended)
            assert fault.done["cut"] == 1
        assert len(sink.got) <= 1000  # a reset may overtake what was on its way
        assert isinstance(sink.ended_by, ConnectionResetError) or len(sink.got) == 1000


async def test_an_orderly_cut_is_an_end_not_a_reset() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        with fault_on(proxy.board, LINK, cut_after_bytes=1000, fin=True):
            writer.write(bytes(5000))
            await eventually(lambda: sink.num_ended)
        assert len(sink.got) == 1000
        assert sink.ended_by is None


async def test_what_is_stalled_arrives_when_the_stall_is_over() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        with fault_on(proxy.board, LINK, stall=True):
            writer.write(b"late")
            await eventually(lambda: proxy.board.pieces(LINK) == 1)
            writer.close()  # nor does the end pass
            await asyncio.sleep(0)
            assert (sink.got, sink.num_ended) == (b"", 0)
        await eventually(lambda: sink.num_ended)
        assert sink.got == b"late"


async def test_a_delay_delays_and_keeps_the_order() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        loop = asyncio.get_running_loop()
        with fault_on(proxy.board, LINK, delay_s=0.2):
            start_s = loop.time()
            for number in range(20):
                writer.write(bytes([number]))
                await writer.drain()
            await eventually(lambda: len(sink.got) == 20)
            assert loop.time() - start_s >= 0.2
        assert sink.got == bytes(range(20))


async def test_a_rate_is_kept() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        loop = asyncio.get_running_loop()
        with fault_on(proxy.board, LINK, rate_bytes_s=200_000):
            start_s = loop.time()
            writer.write(bytes(100_000))
            await eventually(lambda: len(sink.got) == 100_000)
            assert loop.time() - start_s >= 0.4


async def test_a_link_that_is_refused_ends_and_takes_no_new_connection() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        writer.write(b"before")
        await eventually(lambda: sink.got == b"before")
        with fault_on(proxy.board, LINK, refuse=True):
            await eventually(lambda: sink.num_ended)
            reader, other = await asyncio.open_connection("127.0.0.1", proxy.port)
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
            other.close()


async def test_a_fault_is_only_on_the_links_that_it_names() -> None:
    async with behind_proxy() as (proxy, sink, writer):
        with fault_on(proxy.board, "other>server:*", stall=True):
            writer.write(b"passes")
            await eventually(lambda: sink.got == b"passes")


async def send_frames(fault: Fault | None, number: int = 8) -> tuple[Sink, list[bytes]]:
    """Sends HELLO and frames of one block each through a proxy; returns what came out, frame by frame."""
    async with behind_proxy("kv") as (proxy, sink, writer):
        if fault is not None:
            proxy.board.set(LINK, fault)
        writer.write(frames.pack_hello(FENCE, TOKEN))
        for index in range(number):
            writer.write(blocks_frame(index))
        await writer.drain()
        writer.close()
        await eventually(lambda: sink.num_ended)
    size = len(blocks_frame(0))
    assert sink.got[: frames.HEADER_BYTES] == frames.pack_hello(FENCE, TOKEN)
    rest = bytes(sink.got[frames.HEADER_BYTES :])
    return sink, [rest[start : start + size] for start in range(0, len(rest), size)]


SENT = [blocks_frame(index) for index in range(8)]


async def test_frames_pass_as_they_are() -> None:
    assert (await send_frames(None))[1] == SENT


async def test_one_bit_of_the_payload_flips_in_every_fourth_frame() -> None:
    fault = Fault(flip_every=4)
    _, got = await send_frames(fault)
    changed = [index for index in range(8) if got[index] != SENT[index]]
    assert changed == [3, 7]
    assert fault.done["flip"] == 2
    for index in changed:
        assert got[index][:-BLOCK_BYTES] == SENT[index][:-BLOCK_BYTES]
        bits = [(a ^ b).bit_count() for a, b in zip(got[index], SENT[index], strict=True)]
        assert sum(bits) == 1


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(drop_every=3), [0, 1, 3, 4, 6, 7]),
        (Fault(duplicate_every=3, max_times=1), [0, 1, 2, 2, 3, 4, 5, 6, 7]),
        (Fault(swap_every=3), [0, 1, 3, 2, 4, 6, 5, 7]),
        (Fault(swap_every=8), [0, 1, 2, 3, 4, 5, 6, 7]),  # nothing comes behind the last one
    ],
)
async def test_frames_are_dropped_doubled_and_swapped(fault: Fault, expected: list[int]) -> None:
    assert (await send_frames(fault))[1] == [SENT[index] for index in expected]


async def test_a_link_is_cut_in_the_middle_of_the_frame_behind_so_many() -> None:
    sink, _ = await send_frames(Fault(cut_after_pieces=2, fin=True, max_times=1))
    assert len(sink.got) == frames.HEADER_BYTES + 2 * len(SENT[0]) + len(SENT[0]) // 2


async def test_publications_on_nats_are_dropped_and_nothing_else() -> None:
    async with behind_proxy("nats") as (proxy, sink, writer):
        proxy.board.set(LINK, Fault(drop_every=2))
        lines = [b"CONNECT {}\r\n", b"SUB a 1\r\n"]
        published = [
            b"PUB subject %d\r\n%b\r\n" % (3 + number % 2, b"x\r\n" + b"y" * (number % 2)) for number in range(4)
        ]
        writer.write(b"".join(lines + published + [b"PING\r\n"]))
        expected = b"".join([*lines, published[0], published[2], b"PING\r\n"])
        await eventually(lambda: sink.got == expected)
