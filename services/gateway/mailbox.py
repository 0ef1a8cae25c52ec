"""What workers say about one request until its task reads it; and who is woken when, where much is said at once."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

# Readers that are woken in one turn of the loop. Behind them the loop looks for what else has come: a gateway that has too
# much to do finds several tokens of a stream at once then, and sends them with one write.
_AT_ONCE = 4


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

    def peek(self) -> T | None:
        """What ``get_nowait`` would return; None where there is nothing."""
        return self._items[0] if self._items else None

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
    """Wakes readers a few at a time, in the order in which something was left for them."""

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
        for _ in range(min(len(self._sleepers), _AT_ONCE)):
            self._sleepers.popleft().wake()
        self._is_ringing = bool(self._sleepers)
        if self._is_ringing:
            asyncio.get_running_loop().call_soon(self._ring)
