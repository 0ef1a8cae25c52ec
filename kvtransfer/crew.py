"""A few threads that do the pieces of one job together: the checksums and copies of a frame's blocks.

Both let other threads run while they work on large pieces (numpy above 500 elements, xxhash above 64 KiB), so on a machine with
cores for it several threads are several times as fast. Rows of 64 KiB and less are hashed with the interpreter held, by calls
of a few microseconds: sharing those only adds to them, so they stay with one thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Generic, TypeVar

from baton.kvtransfer.rows import Rows

T = TypeVar("T")

# A piece: long enough that handing it to another thread costs little, 0.1 ms or so.
_PIECE_BYTES = 1024 * 1024
# xxhash keeps the interpreter to itself for up to so many bytes.
_MAX_HELD_BYTES = 64 * 1024


class Crew(ThreadPoolExecutor):
    """A pool that knows its size. Whoever runs a job on one of its threads, or elsewhere, is helped by those that are free."""

    def __init__(self, num_threads: int, name: str) -> None:
        super().__init__(num_threads, thread_name_prefix=name)
        self.num_threads = num_threads


def share(executor: Executor, pieces: Sequence[Callable[[], T]]) -> Generator[T, None, None]:
    """What each of the pieces returns, in their order, each as soon as it is there. To be closed: no piece runs after that.

    The caller works as well and waits for nothing but pieces that have begun, so any number of callers can share one crew,
    callers on its own threads among them. The first exception of a piece ends it all. With any other executor than a crew the
    caller works alone.
    """
    num_helpers = min(executor.num_threads, len(pieces)) - 1 if isinstance(executor, Crew) else 0
    if num_helpers < 1:
        for piece in pieces:
            yield piece()
        return
    job = _Job(pieces)
    helpers: list[Future[None]] = []
    try:
        helpers += [executor.submit(job.help) for _ in range(num_helpers)]
        for number in range(len(pieces)):
            yield job.result(number)
    finally:
        job.left.clear()
        wait([helper for helper in helpers if not helper.cancel()])


def shared_checksums(executor: Executor, rows: Rows, indices: Sequence[int]) -> list[int]:
    """``rows.checksums`` with the help of a crew."""
    parts = [lambda part=part: rows.checksums(part) for part in in_pieces(indices, rows.row_bytes)]
    return _joined(executor, parts)


def shared_copy(executor: Executor, rows: Rows, source: Rows, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """``rows.copy_from`` with the help of a crew."""
    parts = [lambda part=part: rows.copy_from(source, part) for part in in_pieces(pairs, rows.row_bytes)]
    return _joined(executor, parts)


def in_pieces(rows: Sequence[T], row_bytes: int) -> list[Sequence[T]]:
    """Rows in as many parts as are worth a thread of their own."""
    if row_bytes <= _MAX_HELD_BYTES:
        return [rows]
    size = max(1, _PIECE_BYTES // row_bytes)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _joined(executor: Executor, parts: Sequence[Callable[[], list[int]]]) -> list[int]:
    with closing(share(executor, parts)) as results:
        return [checksum for part in results for checksum in part]


class _Job(Generic[T]):
    """Pieces under way. Whoever has nothing to do takes the next one."""

    def __init__(self, pieces: Sequence[Callable[[], T]]) -> None:
        self.left = deque(enumerate(pieces))  # taking one off is atomic
        self._results: dict[int, T] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def help(self) -> None:
        while self._do_next():
            pass

    def result(self, number: int) -> T:
        while number not in self._results and self._error is None and self._do_next():
            pass
        with self._changed:
            # Nobody is left to take pieces: this one has been taken, and whoever did is at it.
            self._changed.wait_for(lambda: number in self._results or self._error is not None)
        if self._error is not None:
            raise self._error
        return self._results.pop(number)

    def _do_next(self) -> bool:
        try:
            number, piece = self.left.popleft()
        except IndexError:
            return False
        try:
            result = piece()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self.left.clear()
                self._changed.notify()
            return False
        with self._changed:
            self._results[number] = result
            self._changed.notify()
        return True
