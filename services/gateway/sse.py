"""Server-sent events: a response that notices at once when its client has gone, whatever it is waiting for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.errors import public_error
from baton.services.gateway.gathering import BeforeWaiting
from baton.services.gateway.outlet import Outlet

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"
# More than that leaves although there is more: a client that is behind should not have it all in our memory twice.
_MOST_GATHERED = 16 << 10
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


class Cut:
    """Set once, when the process has no more time for what runs: it is ended with an error."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


@dataclass(frozen=True, slots=True)
class Form:
    """How a stream tells a failure, and how it ends."""

    error: Callable[[BaseException], bytes]
    end: bytes


def _openai_error(error: BaseException) -> bytes:
    return b"data: " + public_error(error).body() + b"\n\n"


OPENAI = Form(_openai_error, DONE)


def event(data: dict[str, Any]) -> bytes:
    """One event with a JSON payload."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T], cut: Cut | None = None) -> T:
    """The result of ``work``, which is cancelled when the client goes: then ClientGoneError. The body must have been read.

    Raises DRAINING where ``cut`` comes first.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    gone, over = _watch(receive), _watch_cut(cut)
    try:
        await _first_of(task, gone, over)
        if task.done():
            return task.result()
        raise _draining() if over.done() else ClientGoneError
    finally:
        await _cancel(task, gone, over)


async def open_stream(
    receive: Receive,
    events: AsyncGenerator[bytes, None],
    keepalive_s: float,
    cut: Cut | None = None,
    form: Form = OPENAI,
    outlet: Outlet | None = None,
) -> EventStream:
    """A response of ``events``. Waits for the first one, so that a failure before it is raised here and gets a real status.

    It does not wait longer than ``keepalive_s``: then the stream begins, and a failure becomes an event. ``outlet``: what the
    events leave through, where somebody else knows it too.
    """
    first = asyncio.ensure_future(anext(events, None))
    gone, over = _watch(receive), _watch_cut(cut)
    try:
        await _first_of(first, gone, over, timeout_s=keepalive_s)
        if first.done():
            first.result()
        elif gone.done() or over.done():
            raise _draining() if over.done() else ClientGoneError
    except BaseException:
        await _cancel(first)
        await events.aclose()
        raise
    finally:
        await _cancel(gone, over)
    return EventStream(first, events, keepalive_s, cut, form, outlet or Outlet())


class EventStream(Response):
    """Sends events as they come and a comment when there was none for ``keepalive_s``.

    It always ends as its form says (with ``[DONE]`` for OpenAI's), behind an error event if something failed or it was cut.
    """

    def __init__(
        self,
        first: asyncio.Future[bytes | None],
        events: AsyncGenerator[bytes, None],
        keepalive_s: float,
        cut: Cut | None,
        form: Form,
        outlet: Outlet,
    ) -> None:
        super().__init__(None, headers=_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._cut = cut
        self._form = form
        self._first = first
        self._events = events
        self._keepalive_s = keepalive_s
        self._outlet = outlet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Future[Any]] = [self._first]
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            outlet = self._outlet
            outlet.begin(send)
            tasks += [body := asyncio.ensure_future(self._send_events()), gone := _watch(receive)]
            tasks.append(over := _watch_cut(self._cut))
            while not any(task.done() for task in (body, gone, over)):
                left_s = outlet.sent_s + self._keepalive_s - loop.time()
                if left_s <= 0:
                    if not outlet.is_sending:  # else the client is slow, not we
                        await outlet.send(KEEPALIVE)
                    left_s = self._keepalive_s
                await _first_of(body, gone, over, timeout_s=left_s)
            if body.done():
                body.result()
            elif over.done() and not outlet.is_sending:
                await _cancel(body)
                await outlet.send(self._form.error(_draining()) + self._form.end, more_body=False)
        finally:
            await _cancel(*tasks)
            await self._outlet.close()
            await self._events.aclose()

    async def _send_events(self) -> None:
        """Events that are there at once leave in one write: a write costs more than the event.

        Where the next has to be waited for, everything has been sent: others may then write to the outlet.
        """
        gathered: list[bytes] = []
        num_bytes = 0

        async def flush() -> None:
            nonlocal num_bytes
            if gathered:
                data = b"".join(gathered)
                gathered.clear()
                num_bytes = 0
                await self._outlet.send(data)

        upcoming: Awaitable[bytes | None] = self._first
        while True:
            try:
                chunk = await BeforeWaiting(upcoming, flush)
            except Exception as error:
                gathered.append(self._form.error(error))
                break
            if chunk is None:
                break
            gathered.append(chunk)
            num_bytes += len(chunk)
            self._outlet.open()
            if num_bytes >= _MOST_GATHERED:
                await flush()
            upcoming = anext(self._events, None)
        gathered.append(self._form.end)
        await self._outlet.send(b"".join(gathered), more_body=False)


def _watch_cut(cut: Cut | None) -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future() if cut is None else asyncio.ensure_future(cut.wait())


def _draining() -> BatonError:
    return BatonError(ErrorCode.DRAINING, "the gateway ended under the request")


def _watch(receive: Receive) -> asyncio.Future[None]:
    """Done when the client has gone. The request's body must have been read."""

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return asyncio.ensure_future(until_gone())


async def _first_of(*tasks: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
