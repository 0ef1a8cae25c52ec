"""Several generators read at once: order, failures, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from baton.services.gateway.fan_out import merge

Log = list[str]


async def source(
    name: str, log: Log, *, num: int = 3, gate: asyncio.Event | None = None, fails: bool = False
) -> AsyncGenerator[str, None]:
    log.append(f"{name} begins")
    try:
        for i in range(num):
            if gate is not None:
                await gate.wait()
            yield f"{name}{i}"
            if fails:
                raise ValueError(name)
    finally:
        log.append(f"{name} ends")


async def test_all_items_come_and_each_source_keeps_its_order() -> None:
    log: Log = []
    items = [item async for item in merge([[source("a", log), source("b", log)], [source("c", log, num=200)]])]
    for name, num in (("a", 3), ("b", 3), ("c", 200)):
        assert [item for item in items if item.startswith(name)] == [f"{name}{i}" for i in range(num)]


async def test_the_others_of_a_group_wait_for_the_first_ones_first_item() -> None:
    log: Log = []
    gate = asyncio.Event()
    async with aclosing(merge([[source("a", log, gate=gate), source("b", log)], [source("c", log)]])) as items:
        assert (await anext(items)).startswith("c")
        assert "b begins" not in log
        gate.set()
        rest = [item async for item in items]
    assert {"b0", "b2", "a2", "c2"} <= set(rest)


async def test_an_empty_first_source_does_not_hold_the_others() -> None:
    assert [item async for item in merge([[source("a", [], num=0), source("b", [])]])] == ["b0", "b1", "b2"]


async def test_a_failure_ends_everything_and_closes_the_others() -> None:
    log: Log = []
    never = asyncio.Event()
    with pytest.raises(ValueError, match="a"):
        async for _ in merge([[source("a", log, fails=True)], [source("b", log, gate=never)], [source("c", log)]]):
            pass
    assert {"a ends", "b ends", "c ends"} <= set(log)


async def test_a_failing_first_source_never_starts_the_others() -> None:
    log: Log = []

    async def broken() -> AsyncGenerator[str, None]:
        raise ValueError("broken")
        yield ""

    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([[broken(), source("b", log)]]):
            pass
    assert log == []


async def test_closing_closes_all_sources() -> None:
    log: Log = []
    async with aclosing(merge([[source("a", log, num=10**9), source("b", log, num=10**9)]])) as items:
        await anext(items)
        await anext(items)
    assert log.count("a ends") == log.count("a begins") == 1
    assert log.count("b ends") == log.count("b begins")
    assert len(asyncio.all_tasks()) == 1


async def test_a_reader_that_does_not_read_holds_the_sources_up() -> None:
    taken = 0

    async def eager() -> AsyncGenerator[int, None]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    async with aclosing(merge([[eager()], [eager()]])) as items:
        await anext(items)
        for _ in range(500):
            await asyncio.sleep(0)
    assert taken < 100
