"""Where the events of one stream leave: for whoever can wait, and, as long as nothing is in the way, at once."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from starlette.types import Message, Send

from baton.services.gateway.gathering import Begun


class Outlet:
    """It is closed until ``open``, and while anything is being sent: what comes meanwhile must not overtake that."""

    def __init__(self) -> None:
        self.sent_s = 0.0  # when something was sent last, by the loop's clock
        self._send: Send | None = None
        self._clock = asyncio.get_running_loop().time
        self._is_open = False
        self._num_sending = 0
        self._late: asyncio.Future[None] | None = None

    def begin(self, send: Send) -> None:
        """The response has begun; its body goes to ``send``."""
        self._send = send
        self.sent_s = self._clock()

    def open(self) -> None:
        """The first event is on its way."""
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """``write`` may be called."""
        return self._is_open and not self._num_sending

    @property
    def is_sending(self) -> bool:
        """The client has not taken yet what it was sent."""
        return self._num_sending > 0

    def write(self, data: bytes) -> None:
        """``send`` for who does not wait. Where the client reads too slowly the outlet is closed until it has caught up.

        ``send`` waits for nothing else, so its first step is nearly always its last.
        """
        assert self._send is not None
        if self._late is not None:  # it is over, or the outlet would be closed; it may have failed
            self._late.result()
            self._late = None
        steps = self._send(_body(data, more_body=True)).__await__()
        try:
            awaited = next(steps)
        except StopIteration:
            self.sent_s = self._clock()
        else:
            self._num_sending += 1
            self._late = asyncio.ensure_future(self._finish(steps, awaited))

    async def send(self, data: bytes, *, more_body: bool = True) -> None:
        """Sends behind everything that was written."""
        assert self._send is not None
        self.sent_s = self._clock()
        self._num_sending += 1
        try:
            if (late := self._late) is not None:
                await late
                self._late = None
            await self._send(_body(data, more_body=more_body))
        finally:
            self._num_sending -= 1

    async def close(self) -> None:
        """Gives up what has not been sent."""
        self._is_open = False
        if self._late is not None:
            self._late.cancel()
            await asyncio.gather(self._late, return_exceptions=True)

    async def _finish(self, steps: Generator[Any, Any, None], awaited: Any) -> None:
        try:
            await Begun(steps, awaited)
            self.sent_s = self._clock()
        finally:
            self._num_sending -= 1


def _body(data: bytes, *, more_body: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}
