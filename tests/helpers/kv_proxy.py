"""A TCP proxy for the data plane that cuts, spoils or holds what passes through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class FaultProxy:
    """Forwards to ``target``. Faults count bytes from sender to receiver, over each connection anew."""

    target: tuple[str, int] = ("", 0)
    port: int = 0
    cut_after: list[int] = field(default_factory=list)  # for each connection in turn; then none is cut
    flip_at: list[int] = field(default_factory=list)  # likewise: the byte to spoil
    hold_after: list[int] = field(default_factory=list)  # likewise: bytes after which nothing more is forwarded
    num_connections: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = self.num_connections
        self.num_connections += 1
        there_reader, there_writer = await asyncio.open_connection(*self.target)
        back = asyncio.create_task(self._copy(there_reader, writer))
        forth = asyncio.create_task(self._forward(reader, there_writer, turn))
        try:
            await asyncio.wait([back, forth], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (back, forth):
                task.cancel()
            for end in (writer, there_writer):
                end.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, turn: int) -> None:
        cut = self.cut_after[turn] if turn < len(self.cut_after) else None
        flip = self.flip_at[turn] if turn < len(self.flip_at) else None
        hold = self.hold_after[turn] if turn < len(self.hold_after) else None
        position = 0
        while data := await reader.read(4096):
            if flip is not None and position <= flip < position + len(data):
                spoiled = bytearray(data)
                spoiled[flip - position] ^= 0x40
                data = bytes(spoiled)
            if cut is not None and position + len(data) > cut:
                writer.write(data[: cut - position])
                await writer.drain()
                return
            if hold is not None and position + len(data) > hold:
                await asyncio.Event().wait()
            position += len(data)
            writer.write(data)
            await writer.drain()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)


@asynccontextmanager
async def fault_proxy() -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy()
    server = await asyncio.start_server(proxy._handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in list(proxy._tasks):
            task.cancel()
        if proxy._tasks:
            await asyncio.wait(proxy._tasks)
