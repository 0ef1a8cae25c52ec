"""Several generators read at once, for requests with several choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")

# Items that wait for a slow reader; then the producers wait.
_MAX_WAITING_ITEMS = 64


class _End(Generic[T]):
    """A source is exhausted, or failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


async def merge(groups: Sequence[Sequence[AsyncGenerator[T, None]]]) -> AsyncGenerator[T, None]:
    """Yields the items of all sources as they come. The first failure ends it; closing it closes all sources.

    In each group the first source runs alone until its first item (or its end): what follows may profit from its work.
    """
    items: asyncio.Queue[T | _End[T]] = asyncio.Queue(_MAX_WAITING_ITEMS)

    async def pump(
        source: AsyncGenerator[T, None], wait_for: asyncio.Event | None, started: asyncio.Event | None
    ) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(source):
                if wait_for is not None:
                    await wait_for.wait()
                async for item in source:
                    if started is not None:
                        started.set()
                    await items.put(item)
        except Exception as failure:
            error = failure
        if started is not None and error is None:
            started.set()
        await items.put(_End(error))

    tasks: list[asyncio.Task[None]] = []
    for group in groups:
        leader_started = asyncio.Event()
        for position, source in enumerate(group):
            waits = (None, leader_started) if position == 0 else (leader_started, None)
            tasks.append(asyncio.create_task(pump(source, *waits)))
    try:
        num_open = len(tasks)
        while num_open:
            item = await items.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task cancelled before its first step never entered its block, and its source would stay open.
        for group in groups:
            for source in group:
                await source.aclose()
