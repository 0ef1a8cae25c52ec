"""Blocks by reference: the receiver maps the sender's rows once and copies each block into its slot.

One copy, on threads, in batches. The checksum is taken of the receiver's own copy after it was made, so a sender that reuses
a block too early is caught like any other corruption. A copy that has begun cannot be stopped: until its batch is over the
handoff is in quarantine.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import compress
from typing import ClassVar, cast

import structlog

from baton.kvtransfer.crew import shared_copy
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.mapping import SharedMemory, host_id, open_mapping
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.rows import Rows
from baton.kvtransfer.transport.base import Arrival, Landed, Offer, Source
from baton.kvtransfer.transport.frames import FrameKind

_log = structlog.get_logger(__name__)

# A batch: long enough that handing it to a thread costs little, short enough (a few ms) that a stop is soon done.
_BATCH_BYTES = 16 * 1024 * 1024
# Batches under way, most of them waiting for a thread: enough to keep it busy while the event loop hears of the one before.
_MAX_BATCHES = 6
# Less than this is copied at once on the event loop: a round trip to the thread takes longer.
_INLINE_BYTES = 256 * 1024


class RowCopier:
    """Lands blocks by copying them out of the sender's rows, which ``attach`` of a transport built on this gave."""

    kind: ClassVar[FrameKind] = FrameKind.BLOCK_REFS
    is_inline: ClassVar[bool] = False
    attaching: Executor | None = None
    waits_for_peer: ClassVar[bool] = False  # a copy can take long: it is never made on the event loop

    def __init__(self, memory: BlockMemory, executor: Executor, crew: Executor | None = None) -> None:
        """Copies run on ``executor``; the threads of ``crew``, if they are others, help with their checksums."""
        self._memory = memory
        self._executor = executor
        self._crew = crew or executor
        self._arrivals: deque[Arrival] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_copying = (
            0  # tasks that will look for arrivals once more; one that is over may still be among the tasks
        )

    def detach(self, source: Source) -> None:
        pass  # unmapped when the last view of it is gone

    def land(self, arrival: Arrival) -> None:
        num_bytes = len(arrival.allowed) * self._memory.block_bytes
        is_quick = not self._memory.is_staged and not self.waits_for_peer
        if num_bytes <= _INLINE_BYTES and not self._num_copying and is_quick:
            arrival.ended(self._copy(arrival, arrival.blocks.only(arrival.allowed).block_ids))
            return
        self._arrivals.append(arrival)
        if self._num_copying < _MAX_BATCHES:
            self._num_copying += 1
            task = asyncio.create_task(self._copy_all(), name="kv-shm")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def stop(self, fence: bytes) -> None:
        for arrival in [arrival for arrival in self._arrivals if arrival.fence == fence]:
            self._arrivals.remove(arrival)
            arrival.ended(Landed(broken=tuple(arrival.allowed)))

    async def close(self) -> None:
        while self._arrivals:
            arrival = self._arrivals.popleft()
            arrival.ended(Landed(broken=tuple(arrival.allowed)))
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _copy_all(self) -> None:
        try:
            while self._arrivals:
                await self._copy_next()
        finally:
            self._num_copying -= 1

    async def _copy_next(self) -> None:
        batch = self._take_batch()
        rows = [await self._memory.claim(arrival.blocks.only(arrival.allowed).block_ids) for arrival in batch]
        try:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._executor, self._copy_batch, batch, rows)
        except Exception:
            _log.exception("kv_copy_failed", num_frames=len(batch))
            results = [Landed(broken=tuple(arrival.allowed)) for arrival in batch]
        for claimed in rows:
            self._memory.unclaim(claimed)
        _report(batch, results)

    def _take_batch(self) -> list[Arrival]:
        """Arrivals for one go of the thread. With staging one at a time: they would wait for each other's rows."""
        batch = [self._arrivals.popleft()]
        num_left = _BATCH_BYTES - len(batch[0].allowed) * self._memory.block_bytes
        while self._arrivals and num_left > 0 and not self._memory.is_staged:
            batch.append(self._arrivals.popleft())
            num_left -= len(batch[-1].allowed) * self._memory.block_bytes
        return batch

    def _copy_batch(self, batch: list[Arrival], rows: list[list[int]]) -> list[Landed]:
        return [self._copy(arrival, part) for arrival, part in zip(batch, rows, strict=True)]

    def _copy(self, arrival: Arrival, rows: Sequence[int]) -> Landed:
        """The allowed blocks land in ``rows``, and from there in their blocks. Runs on any thread."""
        assert arrival.source is not None
        blocks = arrival.blocks.only(arrival.allowed)
        checksums = self._fetch(arrival.source, blocks.source_rows, rows)
        is_right = [ours == theirs for ours, theirs in zip(checksums, blocks.checksums, strict=True)]
        self._store(list(compress(rows, is_right)), list(compress(blocks.block_ids, is_right)))
        landed = tuple(compress(zip(blocks.indices, checksums, strict=True), is_right))
        if len(landed) == len(is_right):
            return Landed(landed)
        return Landed(
            landed, tuple([index for index, right in zip(blocks.indices, is_right, strict=True) if not right])
        )

    def _store(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """Brings rows of ours that were verified into their blocks."""
        self._memory.store(rows, block_ids)

    def _fetch(self, source: Source, source_rows: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Brings rows of the sender into ours; the checksums of our copies."""
        pairs = list(zip(source_rows, rows, strict=True))
        return shared_copy(self._crew, self._memory.rows, cast(Rows, source), pairs)


class ShmTransport(RowCopier):
    """Copies blocks out of memory that a peer on this host shares."""

    name: ClassVar[str] = "shm"

    def __init__(self, memory: BlockMemory, executor: Executor) -> None:
        if memory.shared is None:
            raise TransferError(
                TransferCode.INCOMPATIBLE, "shm: this platform has no memory that other processes can map"
            )
        super().__init__(memory, executor)

    def offer(self) -> SharedMemory | None:
        return self._memory.shared

    def attach(self, offer: Offer) -> Rows:
        if not offer.host_id or offer.host_id != host_id():
            raise TransferError(TransferCode.INCOMPATIBLE, f"shm: host {offer.host_id!r} there, {host_id()!r} here")
        if offer.shared is None:
            raise TransferError(TransferCode.INCOMPATIBLE, "shm: the peer does not say where its memory is")
        num_rows = offer.shared.num_bytes // self._memory.block_bytes
        return Rows(open_mapping(offer.shared), num_rows, self._memory.block_bytes)


def _report(batch: list[Arrival], results: list[Landed]) -> None:
    """What belongs to one handoff is told at once: each telling is a step of its machine and a frame to the sender."""
    by_fence: dict[bytes, list[tuple[Arrival, Landed]]] = {}
    for arrival, result in zip(batch, results, strict=True):
        by_fence.setdefault(arrival.fence, []).append((arrival, result))
    for ended in by_fence.values():
        landed = Landed(
            landed=tuple(block for _, result in ended for block in result.landed),
            corrupt=tuple(index for _, result in ended for index in result.corrupt),
            broken=tuple(index for _, result in ended for index in result.broken),
        )
        ended[0][0].ended(landed)
