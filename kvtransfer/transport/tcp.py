"""Blocks inline on the data-plane connection: works between any two hosts.

The sender's blocks go to the kernel as they are, and come out of it on the other side in their slots. The checksum of a slot is
taken when its last byte is there. A landing that is stopped needs no quarantine: what still comes is read into a sink.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Executor
from typing import Any, ClassVar

from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.transport.base import Arrival, Landed, Offer, Source
from baton.kvtransfer.transport.frames import BlockEntry, FrameKind

_SINK = memoryview(bytearray(64 * 1024))


class TcpTransport:
    """Sends and receives blocks as bytes of the connection."""

    name: ClassVar[str] = "tcp"
    kind: ClassVar[FrameKind] = FrameKind.BLOCKS
    is_inline: ClassVar[bool] = True

    def __init__(self, memory: BlockMemory, executor: Executor) -> None:
        self.memory = memory
        self._executor = executor
        self._arriving: set[_InlineBlocks] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self) -> SharedMemory | None:
        return None

    def attach(self, offer: Offer) -> Source | None:
        return None

    def detach(self, source: Source) -> None:
        pass

    def land(self, arrival: Arrival) -> _InlineBlocks:
        blocks = _InlineBlocks(self, arrival)
        self._arriving.add(blocks)
        wanted = [entry.slot.block_id for entry in arrival.entries if entry.slot.index in arrival.allowed]
        rows = self.memory.try_claim(wanted)
        if rows is not None:
            blocks.start(rows)
        else:
            self._spawn(self._start_later(blocks, wanted))
        return blocks

    def stop(self, fence: bytes) -> None:
        for blocks in [blocks for blocks in self._arriving if blocks.arrival.fence == fence]:
            blocks.give_up()

    async def close(self) -> None:
        for blocks in list(self._arriving):
            blocks.give_up()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def conclude(self, blocks: _InlineBlocks, verified: list[tuple[BlockEntry, int]], landed: Landed) -> None:
        """Reports how a frame's landings ended, once ``verified`` (entry, row) are in their blocks."""
        self._arriving.discard(blocks)
        if self.memory.is_staged and verified:
            self._spawn(self._store(blocks, verified, landed))
        else:
            self.memory.unclaim(blocks.rows)
            blocks.arrival.ended(landed)

    async def _start_later(self, blocks: _InlineBlocks, block_ids: list[int]) -> None:
        blocks.start(await self.memory.claim(block_ids))
        blocks.arrival.resume()

    async def _store(self, blocks: _InlineBlocks, verified: list[tuple[BlockEntry, int]], landed: Landed) -> None:
        rows = [row for _, row in verified]
        block_ids = [entry.slot.block_id for entry, _ in verified]
        await asyncio.get_running_loop().run_in_executor(self._executor, self.memory.store, rows, block_ids)
        self.memory.unclaim(blocks.rows)
        blocks.arrival.ended(landed)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _InlineBlocks:
    """Reads the bytes of one frame's blocks into rows, or past them."""

    def __init__(self, transport: TcpTransport, arrival: Arrival) -> None:
        self.arrival = arrival
        self.rows: list[int] = []
        self.num_left = len(arrival.entries) * transport.memory.block_bytes
        self._transport = transport
        self._memory_rows = transport.memory.rows
        self._block_bytes = transport.memory.block_bytes
        self._targets: list[int | None] | None = None  # the row of each entry; None: into the sink
        self._position = 0  # entry that the next byte belongs to
        self._offset = 0  # and where in it
        self._verified: list[tuple[BlockEntry, int]] = []
        self._corrupt: list[int] = []
        self._has_ended = False

    def start(self, rows: list[int]) -> None:
        """Rows for the allowed blocks are there."""
        if self._has_ended:
            self._transport.memory.unclaim(rows)
            return
        self.rows = rows
        unused = iter(rows)
        allowed = self.arrival.allowed
        self._targets = [next(unused) if entry.slot.index in allowed else None for entry in self.arrival.entries]

    def buffers(self, max_bytes: int, max_buffers: int) -> list[memoryview]:
        if self._targets is None:
            return []
        views: list[memoryview] = []
        num_bytes, offset = 0, self._offset
        for target in self._targets[self._position :]:
            if target is None:
                views.append(_SINK[: self._block_bytes - offset])
            else:
                views.append(self._memory_rows.row(target)[offset:])
            num_bytes += len(views[-1])
            is_cut_short = len(views[-1]) < self._block_bytes - offset
            if is_cut_short or num_bytes >= max_bytes or len(views) == max_buffers:
                break
            offset = 0
        return views

    def advance(self, num_bytes: int) -> None:
        self.num_left -= num_bytes
        self._offset += num_bytes
        while self._offset >= self._block_bytes:
            self._offset -= self._block_bytes
            self._judge(self._position)
            self._position += 1
        if self.num_left == 0:
            self._end()

    def _judge(self, position: int) -> None:
        assert self._targets is not None
        row, entry = self._targets[position], self.arrival.entries[position]
        if row is None:
            return
        if self._memory_rows.checksum(row) == entry.checksum:
            self._verified.append((entry, row))
        else:
            self._corrupt.append(entry.slot.index)

    def give_up(self) -> None:
        """From now on no byte lands in a row."""
        if self._has_ended:
            return
        is_waiting = self._targets is None
        self._targets = [None] * len(self.arrival.entries)
        if self._transport.memory.is_staged:
            self._verified.clear()
        self._end()
        if is_waiting:
            self.arrival.resume()

    def cut(self) -> None:
        self.give_up()

    def _end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        landed = tuple((entry.slot.index, entry.checksum) for entry, _ in self._verified)
        judged = {*(index for index, _ in landed), *self._corrupt}
        broken = tuple(index for index in self.arrival.allowed if index not in judged)
        self._transport.conclude(self, self._verified, Landed(landed, tuple(self._corrupt), broken))
