"""Blocks inline on the data-plane connection: works between any two hosts.

The sender's blocks go to the kernel as they are, and come out of it on the other side in their slots. The checksum of a slot is
taken when its last byte is there. A landing that is stopped needs no quarantine: what still comes is read into a sink.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import Executor
from itertools import compress
from typing import Any, ClassVar, cast

from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.transport.base import Arrival, Landed, Offer, Source
from baton.kvtransfer.transport.frames import FrameKind

_SINK = memoryview(bytearray(64 * 1024))


class TcpTransport:
    """Sends and receives blocks as bytes of the connection."""

    name: ClassVar[str] = "tcp"
    kind: ClassVar[FrameKind] = FrameKind.BLOCKS
    is_inline: ClassVar[bool] = True
    attaching: Executor | None = None

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
        wanted = arrival.blocks.only(arrival.allowed).block_ids
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

    def conclude(self, blocks: _InlineBlocks, landed: Landed) -> None:
        """Reports how a frame's landings ended, once those that landed are in their blocks."""
        self._arriving.discard(blocks)
        if self.memory.is_staged and landed.landed:
            self._spawn(self._store(blocks, landed))
        else:
            self.memory.unclaim(blocks.rows)
            blocks.arrival.ended(landed)

    async def _start_later(self, blocks: _InlineBlocks, block_ids: Sequence[int]) -> None:
        blocks.start(await self.memory.claim(block_ids))
        blocks.arrival.resume()

    async def _store(self, blocks: _InlineBlocks, landed: Landed) -> None:
        whole = blocks.arrival.blocks.only({index for index, _ in landed.landed})
        rows = [blocks.row_of[index] for index in whole.indices]
        block_ids = list(whole.block_ids)
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
        self.rows: Sequence[int] = ()
        self.row_of: dict[int, int] = {}  # index of an allowed block -> its row
        self.num_left = len(arrival.blocks) * transport.memory.block_bytes
        self._transport = transport
        self._memory_rows = transport.memory.rows
        self._block_bytes = transport.memory.block_bytes
        self._is_started = False  # the rows are known
        self._position = 0  # block that the next byte belongs to
        self._offset = 0  # and where in it
        self._landed: list[tuple[int, int]] = []
        self._corrupt: list[int] = []
        self._has_ended = False

    def start(self, rows: Sequence[int]) -> None:
        """Rows for the allowed blocks are there."""
        if self._has_ended:
            self._transport.memory.unclaim(rows)
            return
        self.rows = rows
        self.row_of = dict(zip(self.arrival.blocks.only(self.arrival.allowed).indices, rows, strict=True))
        self._is_started = True

    def buffers(self, max_bytes: int, max_buffers: int) -> list[memoryview]:
        if not self._is_started:
            return []
        size, offset = self._block_bytes, self._offset
        end = self._position - (-(offset + max_bytes) // size)
        rows = [self.row_of.get(index) for index in self.arrival.blocks.indices[self._position : end]]
        if rows[0] is None:  # nobody's: as far as the sink goes
            return [_SINK[: size - offset]]
        wanted = rows[: rows.index(None)] if None in rows else rows
        views = self._memory_rows.spans(cast(list[int], wanted))[:max_buffers]
        views[0] = views[0][offset:]
        return views

    def advance(self, num_bytes: int) -> None:
        self.num_left -= num_bytes
        count, self._offset = divmod(self._offset + num_bytes, self._block_bytes)
        if count:
            self._judge(self._position, self._position + count)
            self._position += count
        if self.num_left == 0:
            self._end()

    def _judge(self, first: int, end: int) -> None:
        """These blocks are whole."""
        indices, announced = self.arrival.blocks.indices[first:end], self.arrival.blocks.checksums[first:end]
        rows = [self.row_of.get(index) for index in indices]
        if None in rows:
            kept = [row is not None for row in rows]
            indices, announced = tuple(compress(indices, kept)), tuple(compress(announced, kept))
            rows = list(compress(rows, kept))
        checksums = self._memory_rows.checksums(cast(list[int], rows))
        is_right = [ours == theirs for ours, theirs in zip(checksums, announced, strict=True)]
        self._landed += compress(zip(indices, checksums, strict=True), is_right)
        if not all(is_right):
            self._corrupt += [index for index, right in zip(indices, is_right, strict=True) if not right]

    def give_up(self) -> None:
        """From now on no byte lands in a row."""
        if self._has_ended:
            return
        is_waiting = not self._is_started
        self._is_started = True
        self.row_of = {}
        if self._transport.memory.is_staged:
            self._landed.clear()
        self._end()
        if is_waiting:
            self.arrival.resume()

    def cut(self) -> None:
        self.give_up()

    def _end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        judged = {*(index for index, _ in self._landed), *self._corrupt}
        broken = tuple([index for index in self.arrival.allowed if index not in judged])
        self._transport.conclude(self, Landed(tuple(self._landed), tuple(self._corrupt), broken))
