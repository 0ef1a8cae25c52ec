"""What workers say about one request until its task reads it; and who is woken when, where much is said at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue for one reader. What is put into it can be left unannounced until ``wake``.

    ``take``: is shown each item for which the reader, who waits, would be woken, and may do with it what the reader would do:
    then it says True, and the reader waits on. What it raises is raised in the reader.
    """

    def __init__(self, take: Callable[[T], bool] | None = None) -> None:
        self.take = take
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
        if reader is None or reader.done():
            return
        while self._items:
            try:
                is_taken = self.take is not None and self.take(self._items[0])
            except Exception as error:
                reader.set_exception(error)
                return
            if not is_taken:
                reader.set_result(None)
                return
            self._items.popleft()

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
