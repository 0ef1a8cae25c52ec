"""Rows of equal length in one piece of host memory: what transports read, write, copy and hash."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

# Longest view over several rows.
_SPAN_BYTES = 1024 * 1024
# A copy this long is still in a core's own cache when its checksum is taken, and the loop around it costs little.
_COPY_BYTES = 256 * 1024


class Rows:
    """``num_rows`` rows of ``row_bytes`` bytes over ``buffer``, which stays alive with this object and its views."""

    def __init__(self, buffer: mmap.mmap | bytearray, num_rows: int, row_bytes: int) -> None:
        self.num_rows = num_rows
        self.row_bytes = row_bytes
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(buffer, np.uint8, count=num_rows * row_bytes)
        self._view = memoryview(buffer)

    @property
    def address(self) -> int:
        """Where the first row begins, for libraries that take numbers."""
        return self._bytes.ctypes.data

    def row(self, index: int) -> memoryview:
        """The bytes of one row; writable if the buffer is."""
        start = index * self.row_bytes
        return self._view[start : start + self.row_bytes]

    def spans(self, indices: Sequence[int]) -> list[memoryview]:
        """The bytes of these rows in their order, those next to each other in one view."""
        size = self.row_bytes
        longest = max(1, _SPAN_BYTES // size)
        pieces = runs([(index, index) for index in indices], longest)
        return [self._view[first * size : (first + count) * size] for first, _, count in pieces]

    def checksums(self, indices: Iterable[int]) -> list[int]:
        """xxh3_64 of each of these rows."""
        digest, view, size = xxhash.xxh3_64_intdigest, self._view, self.row_bytes
        return [digest(view[start : start + size]) for start in map(size.__mul__, indices)]

    def copy_from(self, source: Rows, pairs: Sequence[tuple[int, int]]) -> list[int]:
        """Copies rows, (source row, our row) each, and returns the checksum of each of our copies.

        The checksum is of the copy and taken after it, so that it also tells when the source changed meanwhile.
        """
        size = self.row_bytes
        if size > _COPY_BYTES:
            return [self._copy_in_parts(source, from_row * size, to_row * size) for from_row, to_row in pairs]
        checksums: list[int] = []
        for from_row, to_row, count in runs(pairs, _COPY_BYTES // size):
            ours = self._bytes[to_row * size : (to_row + count) * size]
            ours[:] = source._bytes[from_row * size : (from_row + count) * size]
            checksums += self.checksums(range(to_row, to_row + count))
        return checksums

    def _copy_in_parts(self, source: Rows, from_start: int, to_start: int) -> int:
        """One row that is larger than the cache: each part is hashed right after it was copied."""
        digest = xxhash.xxh3_64()
        for offset in range(0, self.row_bytes, _COPY_BYTES):
            size = min(_COPY_BYTES, self.row_bytes - offset)
            ours = slice(to_start + offset, to_start + offset + size)
            self._bytes[ours] = source._bytes[from_start + offset : from_start + offset + size]
            digest.update(self._view[ours])
        return digest.intdigest()


def runs(pairs: Sequence[tuple[int, int]], longest: int) -> Iterator[tuple[int, int, int]]:
    """Joins pairs that follow each other on both sides: (first source row, first target row, count)."""
    breaks = [
        position
        for position, ((source, target), following) in enumerate(pairwise(pairs), 1)
        if following != (source + 1, target + 1)
    ]
    start = 0
    for end in (*breaks, len(pairs)):
        for first in range(start, end, longest):
            yield *pairs[first], min(longest, end - first)
        start = end
