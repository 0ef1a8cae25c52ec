"""What workers say about one request until its task reads it; and who is woken when, where much is said at once."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue for one reader. What is put into it can be left unannounced until ``wake``."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None

    def empty(self) -> bool:
        return not self._items

    def put_nowait(self, item: T) -> None:
        self._items.append(item)
        self.wake()

    def leave(self, item: T) -> None:
        """Puts it in without waking the reader."""
        self._items.append(item)

    def wake(self) -> None:
        """The reader goes on, if it waits and there is something for it."""
        reader = self._reader
        if reader is not None and self._items and not reader.done():
            reader.set_result(None)

    def newest(self) -> T | None:
        """What was put in last, if it is still there."""
        return self._items[-1] if self._items else None

    def get_nowait(self) -> T:
        """Raises IndexError where there is nothing."""
        return self._items.popleft()

    async def get(self) -> T:
        """Does not wait where there is something."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()


class Bell:
    """Wakes readers one in a turn of the loop, in the order in which something was left for them.

    Between two of them the loop looks for what else has come. A turn costs little, and a write to a client much: a gateway
    that has too much to do finds many tokens of a stream at once that way, and sends them with one write.
    """

    def __init__(self) -> None:
        self._sleepers: deque[Mailbox[object]] = deque()
        self._is_ringing = False

    def add(self, mailbox: Mailbox[T]) -> None:
        """It has something that its reader should hear of soon."""
        self._sleepers.append(mailbox)  # type: ignore[arg-type]  # it is only woken

    def ring(self) -> None:
        """To be called when a message has been taken in."""
        if not self._is_ringing:
            self._ring()

    def _ring(self) -> None:
        if self._sleepers:
            self._sleepers.popleft().wake()
        self._is_ringing = bool(self._sleepers)
        if self._is_ringing:
            asyncio.get_running_loop().call_soon(self._ring)
