"""Copies of several frames at once: each is told, whichever way the copies end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, cast

import numpy as np
import pytest

from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.rows import Rows
from baton.kvtransfer.transport import shm
from baton.kvtransfer.transport.base import Arrival, Landed
from baton.kvtransfer.transport.frames import Blocks
from baton.kvtransfer.transport.shm import _MAX_BATCHES, RowCopier

BLOCK = 4096


class ManualExecutor(Executor):
    """Does what it was given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append(lambda: future.set_result(function(*args, **kwargs)))
        return future

    def run(self) -> None:
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()


async def test_a_frame_that_comes_when_all_copies_have_just_ended_is_copied_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shm, "_BATCH_BYTES", BLOCK)  # one block a batch
    monkeypatch.setattr(shm, "_INLINE_BYTES", 0)  # none on the event loop
    memory, executor, told = HostBlockMemory(_MAX_BATCHES + 1, BLOCK), ManualExecutor(), list[int]()
    data = np.random.default_rng(1).integers(0, 256, 2 * BLOCK, np.uint8)
    source = Rows(cast(Any, bytearray(data.tobytes())), 2, BLOCK)
    copier = RowCopier(memory, executor)

    def ended(landed: Landed) -> None:
        told.extend(index for index, _ in landed.landed)

    def land(index: int) -> None:
        blocks = Blocks((index,), (index,), (1,), (source.checksums((index % 2,))[0],), (index % 2,))
        copier.land(Arrival(b"fence", blocks, {index}, source, lambda: None, ended))

    for index in range(_MAX_BATCHES):
        land(index)
    await asyncio.sleep(0)
    assert len(executor.waiting) == _MAX_BATCHES
    # The results reach the event loop in its next turn, and their tasks end in the one after; the frame comes right then.
    executor.run()
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, land, _MAX_BATCHES)
    for _ in range(4):
        await asyncio.sleep(0)
    assert told == list(range(_MAX_BATCHES))
    executor.run()
    await copier.close()
    assert told == list(range(_MAX_BATCHES + 1))
    assert [bytes(memory.rows.row(index)) for index in told] == [bytes(source.row(index % 2)) for index in told]
    memory.close()
