"""Blocks of a cache that is not host memory: rows are a bounded staging area that blocks pass through on their way."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from baton.kernels import gather_blocks, scatter_blocks
from baton.kvtransfer.device import DeviceCopies
from baton.kvtransfer.mapping import create_mapping
from baton.kvtransfer.memory import NUM_CANARY_BLOCKS
from baton.kvtransfer.rows import Rows, runs

# Host memory that blocks of a GPU pass through, both directions together.
_STAGING_BYTES = 256 << 20


def staging_rows(num_blocks: int, block_bytes: int) -> int:
    """How many rows a worker gives a cache of ``num_blocks``."""
    return max(2, min(num_blocks, _STAGING_BYTES // block_bytes))


class StagedBlockMemory:
    """The blocks of ``kv_cache`` [num_blocks, *block_shape] on any device, through ``num_rows`` rows of host memory.

    Half of the rows are for blocks going out, half for blocks coming in, so that neither direction can starve the other. All
    device copies run on one thread of their own, after what the engine has enqueued (``device.py``), and it waits for each:
    when ``load`` returns the bytes are there, and when ``store`` returns they can be read by kernels launched from then on.
    """

    is_staged = True

    def __init__(self, kv_cache: torch.Tensor, num_rows: int) -> None:
        if num_rows < 2:
            raise ValueError(f"a staging area of {num_rows} rows; each direction needs one")
        self.num_blocks = kv_cache.shape[0]
        self.block_bytes = kv_cache[0].numel() * kv_cache.element_size()
        num_bytes = num_rows * self.block_bytes
        num_rows_in_all = num_rows + NUM_CANARY_BLOCKS
        mapping, self._fd, self.shared = create_mapping(num_rows_in_all * self.block_bytes)
        self.rows = Rows(mapping, num_rows_in_all, self.block_bytes)
        self._num_staging_rows = num_rows
        self._cache = kv_cache
        self._mirror: torch.Tensor | None = None
        self._copies = DeviceCopies(kv_cache.device, self.rows.address, num_rows_in_all * self.block_bytes)
        host = torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes)
        self._host = host.view(kv_cache.dtype).view(num_rows, *kv_cache.shape[1:])
        self._outgoing = _RowPool(range(num_rows // 2))
        self._incoming = _RowPool(range(num_rows // 2, num_rows))
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="kv-staging")
        self.max_rows = num_rows // 2

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self._cache.device

    def mirror(self, device_rows: torch.Tensor | None) -> None:
        """What ``load`` gives also stands in these rows of device memory from now on: all rows as uint8. None: no more."""
        self._mirror = None if device_rows is None else device_rows.view(self.rows.num_rows, self.block_bytes)

    def store_mirrored(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """Like ``store``, from the rows of the mirror."""
        if rows and self._canary_rows(block_ids) is None:
            self._device_thread.submit(self._scatter, list(rows), list(block_ids), is_mirrored=True).result()

    async def load(self, block_ids: Sequence[int]) -> list[int]:
        if (canary := self._canary_rows(block_ids)) is not None:
            if self._mirror is not None:
                await asyncio.get_running_loop().run_in_executor(self._device_thread, self._mirror_rows, canary)
            return canary
        rows = await self._outgoing.take(len(block_ids))
        loop = asyncio.get_running_loop()
        copying = self._device_thread.submit(self._gather, rows, list(block_ids))
        try:
            await asyncio.wrap_future(copying)
        except BaseException:
            # A copy that has begun cannot be stopped: its rows are usable again once it is over.
            copying.add_done_callback(lambda _: loop.call_soon_threadsafe(self.unload, rows))
            raise
        return rows

    def unload(self, rows: Sequence[int]) -> None:
        self._outgoing.give_back([row for row in rows if row < self._num_staging_rows])

    async def claim(self, block_ids: Sequence[int]) -> list[int]:
        if (canary := self._canary_rows(block_ids)) is not None:
            return canary
        return await self._incoming.take(len(block_ids))

    def try_claim(self, block_ids: Sequence[int]) -> list[int] | None:
        return self._canary_rows(block_ids) or self._incoming.try_take(len(block_ids))

    def store(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        if self._canary_rows(block_ids) is None:
            self._device_thread.submit(self._scatter, list(rows), list(block_ids)).result()

    def unclaim(self, rows: Sequence[int]) -> None:
        self._incoming.give_back([row for row in rows if row < self._num_staging_rows])

    def canary_row(self, number: int) -> int:
        return self._num_staging_rows + number

    def _canary_rows(self, block_ids: Sequence[int]) -> list[int] | None:
        """Rows of a canary's block, which has no place in the cache. None: these are blocks of the pool."""
        if not block_ids or block_ids[0] < self.num_blocks:
            return None
        return [self._num_staging_rows + block_id - self.num_blocks for block_id in block_ids]

    def close(self) -> None:
        self._device_thread.shutdown()
        self._copies.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = self.shared = None

    def _gather(self, rows: list[int], block_ids: list[int]) -> None:
        with self._copies.copying():
            blocks = self._buffer(len(rows))
            gather_blocks(self._cache, self._ids(block_ids), blocks)
            for row, index, count in _pieces(rows):
                self._host[row : row + count].copy_(blocks[index : index + count], non_blocking=True)
            if self._mirror is not None:
                self._mirror[self._ids(rows)] = blocks.view(len(rows), -1).view(torch.uint8)

    def _mirror_rows(self, rows: list[int]) -> None:
        """Rows of a canary, which were written on the host."""
        assert self._mirror is not None
        with self._copies.copying():
            for row in set(rows):
                self._mirror[row].copy_(torch.frombuffer(self.rows.row(row), dtype=torch.uint8))

    def _scatter(self, rows: list[int], block_ids: list[int], is_mirrored: bool = False) -> None:
        with self._copies.copying():
            if is_mirrored:
                assert self._mirror is not None
                mirrored = self._mirror[self._ids(rows)].view(self._cache.dtype)
                blocks = mirrored.view(len(rows), *self._cache.shape[1:])
            else:
                blocks = self._buffer(len(rows))
                for row, index, count in _pieces(rows):
                    blocks[index : index + count].copy_(self._host[row : row + count], non_blocking=True)
            scatter_blocks(self._cache, self._ids(block_ids), blocks)

    def _buffer(self, num_blocks: int) -> torch.Tensor:
        """Room on the device, which the allocator keeps for the next one."""
        return torch.empty((num_blocks, *self._cache.shape[1:]), dtype=self._cache.dtype, device=self._cache.device)

    def _ids(self, block_ids: list[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._cache.device)


def _pieces(rows: list[int]) -> Iterator[tuple[int, int, int]]:
    """Rows that follow each other are copied in one piece: (first row, its place in ``rows``, how many)."""
    return runs([(row, index) for index, row in enumerate(rows)], max(1, len(rows)))


class _RowPool:
    """Free rows, handed out first come, first served."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._free = deque(rows)
        self._capacity = len(rows)
        self._waiting: deque[tuple[int, asyncio.Future[list[int]]]] = deque()

    def try_take(self, count: int) -> list[int] | None:
        if count > self._capacity:
            raise ValueError(f"{count} rows asked of a staging area of {self._capacity}")
        if self._waiting or count > len(self._free):
            return None
        return self._pop(count)

    async def take(self, count: int) -> list[int]:
        rows = self.try_take(count)
        if rows is not None:
            return rows
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back(future.result())
            raise

    def give_back(self, rows: Sequence[int]) -> None:
        self._free.extend(rows)
        while self._waiting:
            count, future = self._waiting[0]
            if not future.done():
                if count > len(self._free):
                    return
                future.set_result(self._pop(count))
            self._waiting.popleft()

    def _pop(self, count: int) -> list[int]:
        """In ascending order: more of them follow each other."""
        return sorted(self._free.popleft() for _ in range(count))
