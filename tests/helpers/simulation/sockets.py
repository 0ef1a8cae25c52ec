"""Stream sockets between simulated processes: what the data plane reads and writes, watched by the virtual loop.

Bounded buffers, so that a sender meets a full socket; chunks on the way can be damaged, cut short or doubled, as a broken
middlebox does it.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from helpers.simulation.clock import Process, VirtualLoop, Watched, current_process
from helpers.simulation.network import Connection, Network, Unreachable


class SimSockets:
    """What the data plane of one installation gets its sockets from."""

    def __init__(self, network: Network, capacity: int, bytes_per_s: float) -> None:
        self.network = network
        self.capacity = capacity
        self.bytes_per_s = bytes_per_s
        self.damage: dict[tuple[str, str], list[str]] = {}  # what happens to the next chunks of a way
        self.num_damaged = 0

    def listen(self, host: str, port: int) -> Any:
        listener = SimListener(self, current_process())
        listener.port = self.network.listen(host, port, listener)
        if listener.port == 0:
            raise OSError(98, "Address already in use")
        listener.host = host
        return listener

    async def connect(self, host: str, port: int) -> Any:
        process = current_process()
        try:
            connection = await self.network.connect(process, f"{host}:{port}", kernel_only=True)
        except Unreachable as error:
            raise ConnectionRefusedError(111, str(error)) from None
        # The listener makes the other end in its own process, a moment later.
        ours = SimSocket(self, process, connection)
        connection.peer = ours  # type: ignore[attr-defined]
        connection.kind = "data"
        return ours

    def harm(self, way: tuple[str, str], data: bytes) -> tuple[bytes, bool]:
        """What is left of a chunk on its way, and whether the connection ends behind it."""
        planned = self.damage.get(way)
        if not planned:
            return data, False
        kind = planned.pop()
        self.num_damaged += 1
        self.network.trace.note("network", f"{kind} in {len(data)} bytes {way[0]} -> {way[1]}")
        rng = self.network.rng
        if kind == "flip":
            damaged = bytearray(data)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            return bytes(damaged), False
        if kind == "double":
            return data + data, False
        return data[: rng.randrange(len(data))], True


class _Descriptor(Watched):
    """What both kinds of socket have: a number, and who watches it."""

    def __init__(self, sockets: SimSockets, process: Process) -> None:
        self.sockets = sockets
        self.process = process
        self.is_closed = False
        self._number = sockets.network.take_number()
        self._loop: VirtualLoop = sockets.network.loop
        self._reader: tuple[Callable[..., object], tuple[Any, ...], Any] | None = None
        self._writer: tuple[Callable[..., object], tuple[Any, ...], Any] | None = None
        self._is_read_due = self._is_write_due = False
        self._loop.watch(self._number, self)

    def fileno(self) -> int:
        return -1 if self.is_closed else self._number

    @property
    def is_readable(self) -> bool:
        raise NotImplementedError

    @property
    def is_writable(self) -> bool:
        return True

    def on_readable(self, callback: Callable[..., object] | None, args: tuple[Any, ...], context: Any) -> bool:
        had = self._reader is not None
        self._reader = None if callback is None else (callback, args, context)
        self.notice()
        return had

    def on_writable(self, callback: Callable[..., object] | None, args: tuple[Any, ...], context: Any) -> bool:
        had = self._writer is not None
        self._writer = None if callback is None else (callback, args, context)
        self.notice()
        return had

    def notice(self) -> None:
        """Tells the watchers what they wait for, once a turn, as long as it holds."""
        if self._reader is not None and not self._is_read_due and self.is_readable:
            self._is_read_due = True
            self._loop.call_soon(self._read, context=self._reader[2])
        if self._writer is not None and not self._is_write_due and self.is_writable:
            self._is_write_due = True
            self._loop.call_soon(self._write, context=self._writer[2])

    def _read(self) -> None:
        self._is_read_due = False
        if self._reader is not None and self.is_readable:
            callback, args, _ = self._reader
            callback(*args)
            self.notice()

    def _write(self) -> None:
        self._is_write_due = False
        if self._writer is not None and self.is_writable:
            callback, args, _ = self._writer
            callback(*args)
            self.notice()

    def close(self) -> None:
        self.is_closed = True
        self._reader = self._writer = None
        self._loop.unwatch(self._number)

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def setsockopt(self, *option: Any) -> None:
        pass

    def getsockopt(self, *option: Any) -> int:
        return 0


class SimListener(_Descriptor):
    """A listening socket."""

    host = ""
    port = 0

    def __init__(self, sockets: SimSockets, process: Process) -> None:
        super().__init__(sockets, process)
        self._backlog: deque[SimSocket] = deque()

    @property
    def is_readable(self) -> bool:
        return bool(self._backlog)

    def getsockname(self) -> tuple[str, int]:
        return self.host, self.port

    def accept(self, connection: Connection | None = None) -> Any:
        """Both the network's word that somebody connected, and the program's system call."""
        if connection is not None:
            self._backlog.append(SimSocket(self.sockets, self.process, connection))
            self.notice()
            return None
        if not self._backlog:
            raise BlockingIOError
        return self._backlog.popleft(), ("sim", 0)

    def close(self) -> None:
        super().close()
        self.sockets.network.unlisten(self)
        for waiting in self._backlog:
            waiting.close()


class SimSocket(_Descriptor):
    """One end of a stream."""

    family = socket.AF_UNIX  # no options of TCP

    def __init__(self, sockets: SimSockets, process: Process, connection: Connection) -> None:
        super().__init__(sockets, process)
        self._connection = connection
        self._pipe = connection.pipe(process)
        self._have = bytearray()
        self._num_under_way = 0  # of our bytes: not yet read over there
        self._error: str | None = None
        self._is_ended = False
        self._peer: SimSocket | None = None
        self._early: list[tuple[bytes, bool]] = []  # sent before the other end was made
        connection.kind = "data"
        connection.on_broken[process] = self._on_broken
        if (peer := getattr(connection, "peer", None)) is not None:
            self._peer, peer._peer = peer, self
            for data, is_last in peer._early:
                peer._launch(data, is_last)
            peer._early.clear()
        else:
            connection.peer = self  # type: ignore[attr-defined]

    @property
    def is_readable(self) -> bool:
        return bool(self._have) or self._is_ended or self._error is not None

    @property
    def is_writable(self) -> bool:
        return self._num_under_way < self.sockets.capacity or self._error is not None

    # Sending.

    def sendmsg(self, buffers: Iterable[Any], *_: Any) -> int:
        return self._push(b"".join(buffers))

    def send(self, data: Any, flags: int = 0) -> int:
        return self._push(bytes(data))

    def _push(self, data: bytes) -> int:
        self._check()
        room = self.sockets.capacity - self._num_under_way
        if room <= 0:
            raise BlockingIOError
        data = data[:room]
        self._num_under_way += len(data)
        way = (self.process.host, self._other.host)
        harmed, is_last = self.sockets.harm(way, data)
        self.sockets.network.on_message("data", self.process, self._other)
        if self._peer is None:
            self._early.append((harmed, is_last))
        else:
            self._launch(harmed, is_last)
        return len(data)

    @property
    def _other(self) -> Process:
        connection = self._connection
        return connection.server if self.process is connection.client else connection.client

    def _launch(self, data: bytes, is_last: bool) -> None:
        assert self._peer is not None
        self._pipe.send(self._peer.on_data, data, size_s=len(data) / self.sockets.bytes_per_s)
        if is_last:
            self._pipe.send(self._peer.on_cut)

    # What arrives.

    def on_data(self, data: bytes) -> None:
        if not self.is_closed:
            self._have += data
            self.notice()

    def on_end(self) -> None:
        self._is_ended = True
        self.notice()

    def on_cut(self) -> None:
        self._connection.break_off("connection reset by peer")

    def _on_broken(self, reason: str) -> None:
        self._error = reason
        self.notice()

    # Receiving.

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return self._take([buffer])

    def recvmsg_into(self, buffers: Sequence[Any], *_: Any) -> tuple[int, list[Any], int, Any]:
        return self._take(buffers), [], 0, None

    def _take(self, buffers: Sequence[Any]) -> int:
        if not self._have:
            self._check()
            if self._is_ended:
                return 0
            raise BlockingIOError
        num_read = 0
        for buffer in buffers:
            part = self._have[num_read : num_read + len(buffer)]
            buffer[: len(part)] = part
            num_read += len(part)
            if num_read == len(self._have):
                break
        del self._have[:num_read]
        if self._peer is not None:
            self._peer._num_under_way = max(0, self._peer._num_under_way - num_read)
            self._loop.call_soon(self._peer.notice, context=self._peer.process.context)
        return num_read

    def _check(self) -> None:
        if self.is_closed:
            raise OSError(9, "Bad file descriptor")
        if self._error is not None:
            raise ConnectionResetError(104, self._error)

    def shutdown(self, how: int) -> None:
        self._check()
        self._end()

    def _end(self) -> None:
        if self._peer is not None and self._connection.is_open:
            self._pipe.send(self._peer.on_end)

    def close(self) -> None:
        if not self.is_closed:
            super().close()
            if self._error is None:
                self._end()
                # What the other end still sends is answered with a reset.
                self._connection.on_broken.pop(self.process, None)
                if self._peer is not None and self._peer.is_closed:
                    self._connection.break_off("closed", by=self.process)
