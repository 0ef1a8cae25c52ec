"""Flushed before it waits, and only then; whatever happens meanwhile reaches what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest

from baton.services.gateway.gathering import BeforeWaiting
from baton.services.gateway.sse import DONE, open_stream


async def _nothing() -> None:
    return


async def test_what_comes_at_once_is_gathered_until_the_next_has_to_be_waited_for() -> None:
    gate = asyncio.Event()
    flushed: list[list[int]] = []
    gathered: list[int] = []

    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        yield 2
        await gate.wait()
        yield 3

    async def flush() -> None:
        flushed.append(list(gathered))
        gathered.clear()
        await asyncio.sleep(0)  # as a client that reads slowly
        gate.set()

    source = numbers()
    while (number := await BeforeWaiting(anext(source, None), flush)) is not None:
        gathered.append(number)
    assert flushed == [[1, 2]]
    assert gathered == [3]


async def test_failures_and_ends_come_through() -> None:
    async def fails(*, waits: bool) -> int:
        if waits:
            await asyncio.sleep(0)
        raise ValueError("as scripted")

    for waits in (False, True):
        with pytest.raises(ValueError, match="as scripted"):
            await BeforeWaiting(fails(waits=waits), _nothing)
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 5)
    assert await BeforeWaiting(future, _nothing) == 5


@pytest.mark.parametrize("in_flush", [False, True])
async def test_a_cancellation_reaches_what_is_waited_for(in_flush: bool) -> None:
    ended: list[str] = []

    async def forever() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("closed")
        return 1

    async def flush() -> None:
        if in_flush:
            await asyncio.Event().wait()

    async def wait() -> int:
        return await BeforeWaiting(forever(), flush)

    task = asyncio.create_task(wait())
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["closed"]


async def test_what_flushing_raises_comes_out_and_ends_what_is_waited_for() -> None:
    ended: list[str] = []

    async def forever() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("closed")
        return 1

    async def flush() -> None:
        raise OSError("the client is gone")

    with pytest.raises(OSError, match="the client is gone"):
        await BeforeWaiting(forever(), flush)
    assert ended == ["closed"]


async def test_events_of_a_stream_that_are_there_at_once_leave_in_one_write() -> None:
    gate = asyncio.Event()
    sent: list[MutableMapping[str, Any]] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        yield b"data: 2\n\n"
        await gate.wait()
        yield b"data: 3\n\n"
        for _ in range(3):
            yield b"x" * 16_384

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if len(sent) == 2:
            gate.set()

    stream = await open_stream(receive, events(), keepalive_s=60.0)
    await stream({}, receive, send)
    bodies = [message["body"] for message in sent[1:]]
    assert bodies[0] == b"data: 1\n\ndata: 2\n\n"
    assert b"".join(bodies[1:]) == b"data: 3\n\n" + 3 * 16_384 * b"x" + DONE
    assert len(bodies) == 5, "not everything is kept until the end"
    assert [message["more_body"] for message in sent[1:]] == [True] * 4 + [False]
