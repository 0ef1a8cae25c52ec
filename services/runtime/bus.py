"""The bus carries hints between processes: who is there, which blocks they hold. Losing it or any message is harmless.

So publishing never waits, never raises, and drops (and counts) what cannot be sent now; and a subscriber that needs all
messages numbers them and asks for a snapshot after a gap.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import nats.aio.client
import nats.errors
import structlog

from baton.services.runtime.failpoints import FailpointReached, reach

_log = structlog.get_logger(__name__)

Handler = Callable[[str, bytes], None]  # subject, payload

# nats-py's own values (120 s, 60 tries, then closed for good) take minutes to notice a dead link and then give up.
_PING_INTERVAL_S = 5
_MAX_OUTSTANDING_PINGS = 2
_CONNECT_TIMEOUT_S = 3.0
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 3.0

# Messages waiting to be written. At one announcement a second and one event per step this is many seconds' worth.
_MAX_QUEUED_MESSAGES = 4096


class Bus(Protocol):
    """Publish and subscribe. All methods belong to the event loop's thread."""

    @property
    def is_connected(self) -> bool: ...

    @property
    def num_dropped(self) -> Counter[str]:
        """Messages that were not delivered, by reason."""
        ...

    def publish(self, subject: str, payload: bytes) -> None:
        """Sends when possible; otherwise the message is dropped and counted."""
        ...

    def subscribe(self, subject: str, handler: Handler) -> None:
        """Calls ``handler`` for every message on ``subject`` ("*" stands for one token), for good. Before ``start``."""
        ...

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` whenever the bus is (again) there: the time to introduce oneself. At once if it is there now."""
        ...

    async def start(self) -> None:
        """Begins connecting. Returns without waiting for it."""
        ...

    async def close(self) -> None:
        """Sends what is queued, if that can be done at once, and disconnects."""
        ...


class NatsBus:
    """The bus over NATS. It connects in the background and goes on trying for ever, so no process waits for a NATS server."""

    def __init__(
        self, urls: str, *, name: str, token: str | None = None, tls: Callable[[], ssl.SSLContext] | None = None
    ) -> None:
        """``tls`` is asked for each connection to a ``tls://`` server."""
        self._tls = tls
        self._urls = [url.strip() for url in urls.split(",")]
        self._name = name
        self._token = token
        self._subscriptions: list[tuple[str, Handler]] = []
        self._connect_callbacks: list[Callable[[], None]] = []
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(_MAX_QUEUED_MESSAGES)
        self._client: nats.aio.client.Client | None = None  # set while connected
        self._task: asyncio.Task[None] | None = None
        # Beside the task's cancellation: the client's waits swallow one that comes together with what they wait for.
        self._is_closing = False
        self._dropped: Counter[str] = Counter()
        self._told = ""  # why there was no connection

    @property
    def is_connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def num_dropped(self) -> Counter[str]:
        return self._dropped

    def publish(self, subject: str, payload: bytes) -> None:
        try:
            reach("bus.publish")
        except FailpointReached:
            self._dropped["failpoint"] += 1
            return
        if not self.is_connected:
            self._dropped["disconnected"] += 1
            return
        try:
            self._queue.put_nowait((subject, payload))
        except asyncio.QueueFull:
            self._dropped["queue_full"] += 1

    def subscribe(self, subject: str, handler: Handler) -> None:
        if self._task is not None:
            raise RuntimeError("subscribe before start()")
        self._subscriptions.append((subject, handler))

    def on_connect(self, callback: Callable[[], None]) -> None:
        self._connect_callbacks.append(callback)
        if self.is_connected:
            callback()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._stay_connected(), name="nats")

    async def close(self) -> None:
        if self._client is not None:
            with suppress(TimeoutError, nats.errors.Error, OSError):
                async with asyncio.timeout(1.0):
                    while not self._queue.empty() and self._client is not None:
                        await self._send(self._client, *self._queue.get_nowait())
                    if self._client is not None:
                        await self._client.flush(timeout=1)
        if self._task is not None:
            self._is_closing = True
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _stay_connected(self) -> None:
        # The client's own reconnecting is off: errors that it does not expect end it silently, and it replays stale messages.
        backoff_s = _FIRST_BACKOFF_S
        while True:
            closed = asyncio.Event()
            client = nats.aio.client.Client()
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    await self._connect(client, closed)
                if self._is_closing:
                    return
                self._client = client
                backoff_s = _FIRST_BACKOFF_S
                _log.info("bus connected", servers=self._urls)
                for callback in self._connect_callbacks:
                    callback()
                await self._pump(client, closed)
                _log.warning("bus lost; serving goes on without it", servers=self._urls)
            except (OSError, TimeoutError, nats.errors.Error) as error:
                self._tell_unreachable(str(error) or type(error).__name__, is_tls=isinstance(error, ssl.SSLError))
            except Exception:
                _log.exception("bus connection failed")
            finally:
                self._client = None
                with suppress(Exception):
                    await client.close()
            while not self._queue.empty():
                self._queue.get_nowait()
                self._dropped["disconnected"] += 1
            if self._is_closing:
                return
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))  # noqa: S311  spreads reconnecting, no secret
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def _tell_unreachable(self, why: str, *, is_tls: bool) -> None:
        """A server that is not there comes back; certificates that do not fit are a mistake of somebody's. Once for each."""
        write = _log.warning if is_tls and why != self._told else _log.debug
        self._told = why
        write("bus not reachable", servers=self._urls, error=why)

    async def _connect(self, client: nats.aio.client.Client, closed: asyncio.Event) -> None:
        async def on_closed() -> None:
            closed.set()

        async def on_error(error: Exception) -> None:
            if isinstance(error, nats.errors.SlowConsumerError):  # told of only here
                self._dropped["slow_consumer"] += 1
            _log.debug("bus error", error=str(error) or type(error).__name__)

        await client.connect(
            servers=list(self._urls),
            name=self._name,
            token=self._token,
            allow_reconnect=False,
            # Each server once; the pause before the next round is ours.
            max_reconnect_attempts=1,
            reconnect_time_wait=0.05,
            ping_interval=_PING_INTERVAL_S,
            max_outstanding_pings=_MAX_OUTSTANDING_PINGS,
            connect_timeout=_CONNECT_TIMEOUT_S,
            tls=self._tls() if self._tls is not None else None,
            closed_cb=on_closed,
            error_cb=on_error,
        )
        for subject, handler in self._subscriptions:
            await client.subscribe(subject, cb=_as_callback(handler))

    async def _pump(self, client: nats.aio.client.Client, closed: asyncio.Event) -> None:
        """Writes queued messages until the connection is gone."""
        gone = asyncio.create_task(closed.wait())
        try:
            while not closed.is_set():
                take = asyncio.create_task(self._queue.get())
                await asyncio.wait((take, gone), return_when=asyncio.FIRST_COMPLETED)
                if not take.done():
                    take.cancel()
                    return
                await self._send(client, *take.result())
        finally:
            gone.cancel()

    async def _send(self, client: nats.aio.client.Client, subject: str, payload: bytes) -> None:
        if len(payload) > client.max_payload:  # read each time: it can change with the server
            self._dropped["too_large"] += 1
            return
        try:
            await client.publish(subject, payload)
        except (OSError, nats.errors.Error) as error:
            self._dropped[type(error).__name__] += 1


class InProcessBus:
    """The same bus inside one process: for tests, and for everything in one process. Share one object."""

    def __init__(self) -> None:
        self._subscriptions: list[tuple[list[str], Handler]] = []
        self._dropped: Counter[str] = Counter()
        self._closed = False

    @property
    def is_connected(self) -> bool:
        return not self._closed

    @property
    def num_dropped(self) -> Counter[str]:
        return self._dropped

    def publish(self, subject: str, payload: bytes) -> None:
        if self._closed:
            self._dropped["disconnected"] += 1
            return
        tokens = subject.split(".")
        for pattern, handler in self._subscriptions:
            if len(pattern) == len(tokens) and all(p in ("*", t) for p, t in zip(pattern, tokens, strict=True)):
                # Never from inside publish: a subscriber may be the publisher itself.
                asyncio.get_running_loop().call_soon(_deliver, handler, subject, payload)

    def subscribe(self, subject: str, handler: Handler) -> None:
        self._subscriptions.append((subject.split("."), handler))

    def on_connect(self, callback: Callable[[], None]) -> None:
        callback()

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self._closed = True


class NoBus(InProcessBus):
    """No bus at all: what is published goes nowhere. Workers are named by address instead."""

    @property
    def is_connected(self) -> bool:
        return False

    def publish(self, subject: str, payload: bytes) -> None:
        self._dropped["no_bus"] += 1

    def on_connect(self, callback: Callable[[], None]) -> None:
        pass


def _as_callback(handler: Handler) -> Callable[[Any], Any]:
    async def callback(message: Any) -> None:
        _deliver(handler, message.subject, message.data)

    return callback


def _deliver(handler: Handler, subject: str, payload: bytes) -> None:
    """A message that cannot be used is somebody else's fault: it must not end the subscription."""
    try:
        handler(subject, payload)
    except Exception:
        _log.warning("message dropped", subject=subject, num_bytes=len(payload), exc_info=True)
