"""gRPC between simulated processes: the channels that production code makes, over the simulated network.

Messages are serialised and parsed as always. What differs from gRPC is only what carries them. Of gRPC's behaviour this has
what the system relies on: statuses with details and trailers, deadlines, cancellation in both directions, initial metadata, one
connection per channel, keepalive (see ``network``), and a server that says goodbye.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from helpers.simulation.clock import current_process
from helpers.simulation.network import Connection, Network, Unreachable
from helpers.simulation.rpc_server import EMPTY, ServerCall, SimServer


class _Call:
    """The client's side of one call."""

    def __init__(self, channel: SimChannel, path: str, serialize: Any, deserialize: Any) -> None:
        loop = asyncio.get_running_loop()
        self._channel = channel
        self._path = path
        self._name = path.rpartition("/")[2]
        self._serialize, self._deserialize = serialize, deserialize
        self._connection: Connection | None = None
        self._up: Any = None
        self._remote: ServerCall | None = None
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._metadata: asyncio.Future[Any] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._status: tuple[grpc.StatusCode, str, Any] | None = None
        channel.calls[self] = None

    def begin(self, connection: Connection) -> None:
        self._connection = connection
        client = connection.client
        self._up, down = connection.pipe(client), connection.pipe(connection.server)
        server: SimServer = connection.acceptor  # type: ignore[attr-defined]
        self._remote = ServerCall(server, self._path, connection, down, self)
        self._up.send(self._remote.begin)
        connection.network.trace.note(client, f"-> {connection.server} {self._name}")

    def send(self, message: Any) -> None:
        assert self._remote is not None
        assert self._connection is not None
        self._up.send(self._remote.on_message, self._serialize(message))
        connection = self._connection
        connection.network.on_message(f"{self._name}>", connection.client, connection.server)

    def half_close(self) -> None:
        assert self._remote is not None
        self._up.send(self._remote.on_message, None)

    # What arrives.

    def on_metadata(self, metadata: Any = EMPTY) -> None:
        if not self._metadata.done():
            self._metadata.set_result(metadata)

    def on_message(self, data: bytes) -> None:
        self._inbox.put_nowait(data)

    def on_status(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        self._end(code, details, trailers)

    def on_broken(self, reason: str) -> None:
        self._end(grpc.StatusCode.UNAVAILABLE, reason, EMPTY)

    def _end(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        if self._status is not None:
            return
        self._status = (code, details, trailers)
        self.on_metadata()
        self._ended.set_result(None)
        self._inbox.put_nowait(None)
        self._channel.calls.pop(self, None)
        if self._connection is not None:
            self._connection.drop(self._up)
            if self._remote is not None:
                self._connection.drop(self._remote.down)

    def error(self) -> grpc.aio.AioRpcError:
        assert self._status is not None
        code, details, trailers = self._status
        return grpc.aio.AioRpcError(code, EMPTY, trailers, details=details)

    def give_up(self, code: grpc.StatusCode = grpc.StatusCode.CANCELLED) -> bool:
        if self._status is not None:
            return False
        if self._remote is not None:
            self._up.send(self._remote.on_cancel)
        self._end(code, "Locally cancelled by application!", EMPTY)
        return True

    async def next_message(self) -> bytes:
        """Raises AioRpcError at the end, also at a good one."""
        data = await self._inbox.get()
        if data is None:
            self._inbox.put_nowait(None)
            assert self._status is not None
            if self._channel.is_closed and self._status[0] is grpc.StatusCode.CANCELLED:
                raise asyncio.CancelledError
            raise self.error()
        return data


class _StreamCall(_Call):
    """What a stub returns for a call with streams in both directions."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        try:
            connection = await self._channel.connected()
        except Unreachable as error:
            self._end(grpc.StatusCode.UNAVAILABLE, str(error), EMPTY)
            return
        if self._status is None:
            self.begin(connection)

    async def write(self, message: Any) -> None:
        await asyncio.shield(self._opening)
        if self._status is not None:
            if self._status[0] is grpc.StatusCode.OK or self._status[0] is grpc.StatusCode.CANCELLED:
                raise asyncio.InvalidStateError("RPC already finished.")
            raise self.error()
        self.send(message)

    async def initial_metadata(self) -> Any:
        return await asyncio.shield(self._metadata)

    async def code(self) -> grpc.StatusCode:
        await asyncio.shield(self._ended)
        assert self._status is not None
        return self._status[0]

    async def done_writing(self) -> None:
        await asyncio.shield(self._opening)
        if self._status is None:
            self.half_close()

    def done(self) -> bool:
        return self._status is not None

    def cancel(self) -> bool:
        return self.give_up()

    async def read(self) -> Any:
        try:
            return self._deserialize(await self.next_message())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.OK:
                return grpc.aio.EOF
            raise

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class SimChannel:
    """A channel to one address. It connects when it is first used, and again after it lost its connection."""

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._process = current_process()
        self._connecting: asyncio.Task[Connection] | None = None
        self.calls: dict[_Call, None] = {}
        self.is_closed = False

    async def __aenter__(self) -> SimChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        self.is_closed = True
        for call in list(self.calls):
            call.give_up()
        task, self._connecting = self._connecting, None
        if task is None:
            return
        if not task.done():
            task.cancel()
        elif not task.cancelled() and task.exception() is None:
            task.result().break_off("connection closed by the client", by=self._process)

    async def connected(self) -> Connection:
        """Raises Unreachable."""
        if self.is_closed:
            raise grpc.aio.UsageError("Channel is closed.")
        if self._connecting is None or _is_spent(self._connecting):
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Connection:
        connection = await self._network.connect(self._process, self._address, kernel_only=False)
        connection.on_broken[self._process] = self._on_broken
        return connection

    def _on_broken(self, reason: str) -> None:
        self._connecting = None
        for call in list(self.calls):
            call.on_broken(reason)

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Any]:
        async def call(request: Any, *, timeout: float | None = None, **_: Any) -> Any:
            made = _Call(self, method, request_serializer, response_deserializer)
            try:
                async with asyncio.timeout(timeout):
                    made.begin(await self.connected())
                    made.send(request)
                    made.half_close()
                    return response_deserializer(await made.next_message())
            except Unreachable as error:
                made.on_broken(str(error))
                raise made.error() from error
            except TimeoutError:
                made.give_up(grpc.StatusCode.DEADLINE_EXCEEDED)
                raise made.error() from None
            finally:
                made.give_up()

        return call

    def stream_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Any]:
        return lambda **_: _StreamCall(self, method, request_serializer, response_deserializer)

    def _other(self, *args: Any, **_: Any) -> Callable[..., Any]:
        raise NotImplementedError("no such call between our processes")

    unary_stream = stream_unary = _other


def _is_spent(task: asyncio.Task[Connection]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None or not task.result().is_open)
