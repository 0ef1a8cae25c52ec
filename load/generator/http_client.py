"""Just enough of HTTP/1.1 for a load generator: kept-alive connections, one POST each, bytes of the body as they come.

Small, since processor time that a client takes is missing in what it measures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

from baton.services.runtime.client_tls import client_context

# Servers close connections that nobody uses, often after 5 s. An older one is not used again: a request that meets its end
# would fail, and to send it twice could hide a server's failure.
_MAX_IDLE_S = 2.5


class ConnectionBroken(Exception):
    """The other side closed or reset it, or spoke no HTTP."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server's address."""

    host: str
    port: int
    is_tls: bool
    prefix: str  # of every path, without the slash behind it

    @staticmethod
    def parse(url: str) -> Target:
        """Raises ValueError for what is not http(s)://HOST[:PORT][/PREFIX]."""
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname or split.query or split.fragment:
            raise ValueError(f"must look like http://host:8000, got {url!r}")
        is_tls = split.scheme == "https"
        # People paste the base URL of OpenAI's client, which ends in /v1.
        prefix = split.path.rstrip("/").removesuffix("/v1")
        return Target(split.hostname, split.port or (443 if is_tls else 80), is_tls, prefix)


@dataclass(slots=True)
class Response:
    """Status and headers (names in lower case) of an answer whose body has been taken."""

    status: int
    headers: dict[str, str]


class HttpClient:
    """A pool of connections to one server. As many as there are requests at once: an open loop does not wait for one."""

    def __init__(self, target: Target, headers: Mapping[str, str]) -> None:
        self._target = target
        host = f"[{target.host}]" if ":" in target.host else target.host
        fixed = {"host": f"{host}:{target.port}", "accept": "*/*", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())
        self._tls = client_context() if target.is_tls else None
        self._idle: list[tuple[_Connection, float]] = []  # with the moment since when

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        *,
        headers: Mapping[str, str] | None = None,
        on_sent: Callable[[], None] = lambda: None,
        on_head: Callable[[Response], None] = lambda _: None,
        on_body: Callable[[bytes], None],
    ) -> Response:
        """Calls ``on_body`` with what comes, when it comes; returns at the end of the answer.

        Raises OSError where no connection can be made, ConnectionBroken where it breaks. Cancelling closes the connection.
        """
        lines = [f"{method} {self._target.prefix}{path} HTTP/1.1\r\n{self._head}"]
        lines += [f"{name}: {value}\r\n" for name, value in (headers or {}).items()]
        if body is not None:
            lines.append(f"content-type: application/json\r\ncontent-length: {len(body)}\r\n")
        message = "".join(lines).encode() + b"\r\n" + (body or b"")
        connection = self._take_idle() or await self._connect()
        is_reusable = False
        try:
            response = await connection.exchange(message, on_sent, on_head, on_body)
            is_reusable = connection.is_reusable
            return response
        finally:
            if is_reusable:
                self._idle.append((connection, asyncio.get_running_loop().time()))
            else:
                connection.close()

    def close(self) -> None:
        for connection, _ in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        _, protocol = await asyncio.get_running_loop().create_connection(
            _Connection, self._target.host, self._target.port, ssl=self._tls
        )
        return protocol

    def _take_idle(self) -> _Connection | None:
        """The one that was used last, if it is fresh."""
        oldest_s = asyncio.get_running_loop().time() - _MAX_IDLE_S
        while self._idle:
            connection, idle_since_s = self._idle.pop()
            if idle_since_s >= oldest_s and connection.is_reusable:
                return connection
            connection.close()
        return None


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. httptools calls the ``on_`` methods."""

    def __init__(self) -> None:
        self._transport: Any = None  # uvloop's is no asyncio.Transport
        self._is_lost = False
        self._parser: Any = None
        self._done: asyncio.Future[Response] | None = None
        self._headers: dict[str, str] = {}
        self._keeps_alive = False
        self._ends_with_connection = False
        self._on_head: Callable[[Response], None] = lambda _: None
        self._on_body: Callable[[bytes], None] = lambda _: None

    @property
    def is_reusable(self) -> bool:
        return self._keeps_alive and not self._is_lost

    async def exchange(
        self,
        message: bytes,
        on_sent: Callable[[], None],
        on_head: Callable[[Response], None],
        on_body: Callable[[bytes], None],
    ) -> Response:
        if self._is_lost or self._transport is None:
            raise ConnectionBroken("the server closed the connection")
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._headers, self._keeps_alive, self._ends_with_connection = {}, False, False
        self._on_head, self._on_body = on_head, on_body
        self._transport.write(message)
        on_sent()
        try:
            return await self._done
        finally:
            self._done = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        if self._ends_with_connection and exc is None:
            self.on_message_complete()
        self._fail(ConnectionBroken("the server reset the connection" if exc else "the server closed the connection"))

    def eof_received(self) -> bool:
        return False  # close: without its other half a connection is of no use

    def data_received(self, data: bytes) -> None:
        if self._done is None:
            self.close()  # an answer that nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ConnectionBroken(f"no HTTP: {error}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._ends_with_connection = not self._headers.keys() & {"content-length", "transfer-encoding"}
        self._on_head(Response(self._parser.get_status_code(), self._headers))

    def on_body(self, body: bytes) -> None:
        self._on_body(body)

    def on_message_complete(self) -> None:
        self._keeps_alive = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(Response(self._parser.get_status_code(), self._headers))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
