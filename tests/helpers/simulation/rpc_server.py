"""gRPC between simulated processes: the servers that production code makes. ``rpc`` has the other end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import grpc
import grpc.aio
from helpers.simulation.clock import current_process
from helpers.simulation.network import Connection, Network

EMPTY = grpc.aio.Metadata()


class Caller(Protocol):
    """The client's side of a call, as messages reach it."""

    def on_metadata(self, metadata: Any) -> None: ...

    def on_message(self, data: bytes) -> None: ...

    def on_status(self, code: grpc.StatusCode, details: str, trailers: Any) -> None: ...


class ServerCall:
    """The server's side of one call, and the context that its handler gets."""

    def __init__(self, server: SimServer, path: str, connection: Connection, down: Any, remote: Caller) -> None:
        self.down = down
        self._server = server
        self._path = path
        self._connection = connection
        self._remote = remote
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._has_metadata = False
        self._has_ended = False
        self._serialize: Any = None

    # What arrives.

    def begin(self) -> None:
        if self._server.is_stopping:
            self._finish(grpc.StatusCode.UNAVAILABLE, "the server is stopping", EMPTY)
            return
        self._server.calls[self] = None
        self._task = asyncio.get_running_loop().create_task(self._serve(), name=f"rpc {self._path}")

    def on_message(self, data: bytes | None) -> None:
        self._inbox.put_nowait(data)

    def on_cancel(self) -> None:
        """The client wants no more, or is gone: the handler is cancelled, as gRPC does it."""
        self._has_ended = True
        if self._task is not None:
            self._task.cancel()

    def is_on(self, connection: Connection) -> bool:
        return self._connection is connection

    async def _serve(self) -> None:
        try:
            handler = await self._server.find(self._path)
            if handler is None:
                self._finish(grpc.StatusCode.UNIMPLEMENTED, "Method not found!", EMPTY)
                return
            self._serialize = handler.response_serializer
            if handler.unary_unary:
                await self._serve_one(handler)
            else:
                await self._serve_stream(handler)
            self._finish(grpc.StatusCode.OK, "", EMPTY)
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            self._finish(grpc.StatusCode.CANCELLED, "the call was cancelled", EMPTY)
            raise
        except Exception as error:  # what gRPC makes of it
            self._finish(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}", EMPTY)
        finally:
            self._server.calls.pop(self, None)

    async def _serve_one(self, handler: Any) -> None:
        data = await self._inbox.get()
        if data is not None:
            response = await handler.unary_unary(handler.request_deserializer(data), self)
            self._send(self._serialize(response))

    async def _serve_stream(self, handler: Any) -> None:
        responses = handler.stream_stream(self._requests(handler.request_deserializer), self)
        if hasattr(responses, "__aiter__"):
            async with contextlib.aclosing(responses):
                async for response in responses:
                    self._send(self._serialize(response))
        else:
            await responses

    async def _requests(self, deserialize: Any) -> AsyncIterator[Any]:
        while (data := await self._inbox.get()) is not None:
            yield deserialize(data)

    def _send(self, data: bytes) -> None:
        if not self._has_ended:
            self._say_metadata()
            self.down.send(self._remote.on_message, data)
            connection = self._connection
            name = self._path.rpartition("/")[2]
            connection.network.on_message(f"{name}<", connection.server, connection.client)

    def _say_metadata(self, metadata: Any = EMPTY) -> None:
        if not self._has_metadata:
            self._has_metadata = True
            self.down.send(self._remote.on_metadata, metadata)

    def _finish(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.down.send(self._remote.on_status, code, details, trailers)

    def stop(self) -> None:
        """The server's grace is over."""
        self._finish(grpc.StatusCode.UNAVAILABLE, "the server has stopped", EMPTY)
        if self._task is not None:
            self._task.cancel()

    # grpc.aio.ServicerContext, as far as it is used.

    async def send_initial_metadata(self, metadata: Sequence[Any]) -> None:
        self._say_metadata(grpc.aio.Metadata(*metadata))

    async def write(self, message: Any) -> None:
        self._send(self._serialize(message))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self._finish(code, details, trailing_metadata or EMPTY)
        raise grpc.aio.AbortError


class SimServer:
    """A server of one process. Made by ``create_server`` of the worker's environment."""

    def __init__(self, network: Network, interceptors: Sequence[Any]) -> None:
        self.process = current_process()
        self.calls: dict[ServerCall, None] = {}
        self.is_stopping = False
        self._network = network
        self._interceptors = interceptors
        self._methods: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        self._connections: dict[Connection, None] = {}
        self._address: tuple[str, int] | None = None

    def add_insecure_port(self, address: str) -> int:
        host, _, port = address.rpartition(":")
        bound = self._network.listen(host, int(port), self)
        self._address = (host, bound)
        self.is_stopping = True  # until it starts
        return bound

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Registered by method as well."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self._methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    async def start(self) -> None:
        self.is_stopping = False

    async def stop(self, grace: float | None) -> None:
        self.is_stopping = True
        self._network.unlisten(self)
        deadline_s = asyncio.get_running_loop().time() + (grace or 0.0)
        while self.calls and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.05)
        for call in list(self.calls):
            call.stop()
        while self.calls:
            await asyncio.sleep(0.001)
        for connection in list(self._connections):
            connection.break_off("the server has stopped", by=self.process)

    async def find(self, path: str) -> Any:
        """The handler behind all interceptors."""
        if path not in self._found:
            found = self._methods.get(path)

            async def innermost(details: Any) -> Any:
                return found

            handler = innermost
            for interceptor in reversed(self._interceptors):
                handler = _wrapped(interceptor, handler)
            self._found[path] = await handler(_Details(path))
        return self._found[path]

    def accept(self, connection: Connection) -> None:
        connection.acceptor = self  # type: ignore[attr-defined]
        connection.on_broken[self.process] = lambda reason: self._on_broken(connection)
        self._connections[connection] = None

    def _on_broken(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        for call in [call for call in self.calls if call.is_on(connection)]:
            call.on_cancel()


class _Details:
    def __init__(self, method: str) -> None:
        self.method = method


def _wrapped(interceptor: Any, continuation: Any) -> Any:
    return lambda details: interceptor.intercept_service(continuation, details)
