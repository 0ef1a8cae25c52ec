"""Mailboxes of requests, and the bell that wakes their readers a few at a time."""

from __future__ import annotations

import asyncio

import pytest
from helpers.waiting import eventually

from baton.services.gateway.mailbox import Bell, Mailbox


async def test_a_reader_gets_everything_in_order_and_waits_for_more() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.put_nowait(1)
    mailbox.leave(2)
    assert (mailbox.newest(), mailbox.newest()) == (2, 2), "looking takes nothing"
    assert [await mailbox.get(), await mailbox.get()] == [1, 2]
    assert mailbox.empty()
    assert mailbox.newest() is None
    reading = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    mailbox.leave(3)
    await asyncio.sleep(0)
    assert not reading.done(), "nobody has woken it"
    mailbox.wake()
    assert await reading == 3
    mailbox.wake()


async def test_a_reader_that_gives_up_takes_nothing_with_it() -> None:
    mailbox: Mailbox[int] = Mailbox()
    reading = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put_nowait(1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert await mailbox.get() == 1


async def test_what_is_taken_for_the_reader_does_not_wake_it() -> None:
    taken: list[int] = []

    def take(number: int) -> bool:
        if number == 0:
            raise ValueError("as scripted")
        taken.append(number)
        return number < 10

    mailbox: Mailbox[int] = Mailbox(take)
    mailbox.put_nowait(1)
    assert taken == [], "the reader was not there"
    assert await mailbox.get() == 1
    reading = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    for number in (2, 3):
        mailbox.put_nowait(number)
    mailbox.leave(4)
    assert (taken, mailbox.newest()) == ([2, 3], 4)
    mailbox.put_nowait(10)
    mailbox.put_nowait(5)
    assert taken == [2, 3, 4, 10], "once the reader was woken, it reads by itself"
    assert [await reading, await mailbox.get()] == [10, 5]
    reading = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put_nowait(0)
    with pytest.raises(ValueError, match="as scripted"):
        await reading


async def test_all_readers_are_woken_and_what_came_meanwhile_is_there_at_once() -> None:
    bell = Bell()
    mailboxes: list[Mailbox[int]] = [Mailbox() for _ in range(50)]
    heard: list[list[int]] = [[] for _ in mailboxes]

    async def read(mailbox: Mailbox[int], into: list[int]) -> None:
        while True:
            into.append(await mailbox.get())
            while not mailbox.empty():
                into.append(mailbox.get_nowait())
            into.append(-1)

    readers = [asyncio.ensure_future(read(*pair)) for pair in zip(mailboxes, heard, strict=True)]
    await asyncio.sleep(0)
    for token in (1, 2):
        for mailbox in mailboxes:
            mailbox.leave(token)
            bell.add(mailbox)
        bell.ring()
    await eventually(lambda: all(into.count(-1) for into in heard))
    assert all([token for token in into if token > 0] == [1, 2] for into in heard)
    assert heard[-1] == [1, 2, -1], "its turn came when both were there"
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
