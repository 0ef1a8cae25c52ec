"""The memory that a worker's blocks live in, as the transfer sees it.

``BlockMemory`` is the interface. A transport never touches a block directly: it reads and writes *rows* of host memory. Where
the cache itself is host memory (``HostBlockMemory``) a block is its own row and nothing is copied; where it is a GPU's
(``staging.py``) rows are a bounded staging area.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch

from baton.kvtransfer.mapping import SharedMemory, create_mapping
from baton.kvtransfer.rows import Rows

NUM_CANARY_BLOCKS = 8
"""Blocks behind the last one of the pool, each with a row of its own. Their ids go on from the pool's; ``load``, ``claim`` and
so on take them, alone, any number of times at once. Canaries are sent from the first; each transport's land in another."""


class BlockMemory(Protocol):
    """Blocks of ``block_bytes`` bytes and the rows of host memory that they travel through."""

    num_blocks: int
    block_bytes: int
    rows: Rows
    shared: SharedMemory | None  # the rows, for peers on this host; None: they cannot be shared
    is_staged: bool  # ``load`` and ``store`` copy, and must not run on an event loop

    async def load(self, block_ids: Sequence[int]) -> list[int]:
        """Rows that hold these blocks' bytes until they are given back with ``unload``; waits while there are none."""
        ...

    def unload(self, rows: Sequence[int]) -> None:
        """Gives back rows of ``load``."""
        ...

    async def claim(self, block_ids: Sequence[int]) -> list[int]:
        """Rows that blocks can land in until they are given back with ``unclaim``; waits while there are none."""
        ...

    def try_claim(self, block_ids: Sequence[int]) -> list[int] | None:
        """The same at once, or None when it would have to wait."""
        ...

    def store(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        """Brings rows that landed and were verified into their blocks. Returns when they are there."""
        ...

    def unclaim(self, rows: Sequence[int]) -> None:
        """Gives back rows of ``claim``."""
        ...

    @property
    def max_rows(self) -> int:
        """Most rows that one ``load`` or ``claim`` may ask for."""
        ...

    def canary_row(self, number: int) -> int:
        """The row of block ``num_blocks + number``."""
        ...

    def close(self) -> None:
        """Lets go of the memory. Views that are still around keep it alive."""
        ...


class HostBlockMemory:
    """A block pool's bytes in host memory. On Linux a memfd: it has no name, and nothing is left when the process is killed."""

    is_staged = False

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        num_bytes = num_blocks * block_bytes
        num_rows = num_blocks + NUM_CANARY_BLOCKS
        mapping, self._fd, self.shared = create_mapping(num_rows * block_bytes)
        self.rows = Rows(mapping, num_rows, block_bytes)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes)
        """All blocks as [num_blocks * block_bytes] uint8, for the engine to lay its cache in."""

    @property
    def max_rows(self) -> int:
        return self.num_blocks

    async def load(self, block_ids: Sequence[int]) -> list[int]:
        return list(block_ids)

    def unload(self, rows: Sequence[int]) -> None:
        pass

    async def claim(self, block_ids: Sequence[int]) -> list[int]:
        return list(block_ids)

    def try_claim(self, block_ids: Sequence[int]) -> list[int] | None:
        return list(block_ids)

    def store(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        pass

    def unclaim(self, rows: Sequence[int]) -> None:
        pass

    def canary_row(self, number: int) -> int:
        return self.num_blocks + number

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = self.shared = None
