"""The network between simulated processes: connections with latency, and everything that can happen to them.

A connection is to a listening address. Its two ends each belong to a process. What is sent over a ``Pipe`` arrives in order,
in the context of the process that it is for; while the way is blocked it is kept back, as TCP does. A killed process resets
its connections, a machine that lost power does not: then only keepalive finds out.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from helpers.simulation.clock import Process, State, VirtualLoop
from helpers.simulation.trace import Trace

_GAP_S = 1e-7
# What the operating system and gRPC allow a connection to take until it stands.
CONNECT_TIMEOUT_S = 2.0


class Unreachable(Exception):
    """No connection is to be had."""


class Acceptor(Protocol):
    """Who listens."""

    process: Process

    def accept(self, connection: Connection) -> None:
        """A connection was made. Runs in the listener's process."""
        ...


class Network:
    """Latencies and faults. All randomness is the seed's."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, trace: Trace, keepalive_s: tuple[float, float]) -> None:
        self.loop = loop
        self.trace = trace
        self.rng = rng
        self.slowness: dict[tuple[str, str], float] = {}  # factor on the latency of a way
        self.latency_s = rng.choice([1e-4, 5e-4, 2e-3])
        self._keepalive_s = keepalive_s  # shortest and longest time until a silent peer is given up
        self._listeners: dict[str, Acceptor] = {}
        self._blocked: set[tuple[str, str]] = set()
        self._without_power: set[str] = set()
        self._connections: dict[Connection, None] = {}
        self.hosts: dict[str, str] = {}  # IP address -> name of the machine
        self._next_port = 40_000
        self._numbers = 1000
        self.is_over = False
        # Hears of every message as it leaves: its name ("Reserve>" asks, "Reserve<" answers), and whose it is.
        self.on_message: Callable[[str, Process, Process], None] = lambda name, source, target: None

    def take_number(self) -> int:
        """A descriptor."""
        self._numbers += 1
        return self._numbers

    # Listening and connecting.

    def listen(self, host: str, port: int, acceptor: Acceptor) -> int:
        """Returns the port; 0 where it is taken."""
        if port == 0:
            self._next_port += 1
            port = self._next_port
        address = f"{host}:{port}"
        if address in self._listeners:
            return 0
        self._listeners[address] = acceptor
        return port

    def unlisten(self, acceptor: Acceptor) -> None:
        for address in [address for address, known in self._listeners.items() if known is acceptor]:
            del self._listeners[address]

    async def connect(self, client: Process, address: str, *, kernel_only: bool) -> Connection:
        """A connection to ``address``. ``kernel_only``: it stands although the program over there is stopped.

        Raises Unreachable.
        """
        host = self.hosts[address.rpartition(":")[0]]
        deadline = self.loop.time() + CONNECT_TIMEOUT_S
        await asyncio.sleep(self.delay(client.host, host) + self.delay(host, client.host))
        while True:
            acceptor = self._listeners.get(address)
            is_paused = acceptor is not None and acceptor.process.state is State.PAUSED and not kernel_only
            if not (self.is_blocked(client.host, host) or self.is_blocked(host, client.host) or is_paused):
                break
            if self.loop.time() >= deadline:
                raise Unreachable("connect timed out")
            await asyncio.sleep(0.25)
        if acceptor is None:
            raise Unreachable("connection refused")
        connection = Connection(self, client, acceptor.process)
        self._connections[connection] = None
        self.loop.call_soon(acceptor.accept, connection, context=acceptor.process.context)
        return connection

    def forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    # Ways.

    def delay(self, source: str, target: str) -> float:
        slow = self.slowness.get((source, target), 1.0)
        return self.latency_s * slow * (0.5 + self.rng.random())

    def is_blocked(self, source: str, target: str) -> bool:
        way = self._blocked
        return (source, target) in way or source in self._without_power or target in self._without_power

    # Faults.

    def block(self, ways: list[tuple[str, str]]) -> None:
        self._blocked.update(ways)
        for connection in list(self._connections):
            if {connection.client.host, connection.server.host} in [set(way) for way in ways]:
                connection.darken()

    def unblock(self, ways: list[tuple[str, str]]) -> None:
        self._blocked.difference_update(ways)
        for connection in list(self._connections):
            connection.lighten()

    def reset(self, first: str, second: str, *, kinds: tuple[str, ...]) -> int:
        """Resets the connections of two hosts, as a proxy between them that restarts; returns how many."""
        found = [c for c in self._connections if {c.client.host, c.server.host} == {first, second} and c.kind in kinds]
        for connection in found:
            connection.break_off("connection reset by peer")
        return len(found)

    def paused(self, process: Process) -> None:
        for connection in list(self._connections):
            if process in (connection.client, connection.server):
                connection.darken()

    def woken(self, process: Process) -> None:
        for connection in list(self._connections):
            connection.lighten()

    def killed(self, process: Process, *, power: bool = True) -> None:
        """Its listeners are gone. ``power``: the kernel lives and says so on every connection."""
        for address in [a for a, known in self._listeners.items() if known.process is process]:
            del self._listeners[address]
        if not power:
            self._without_power.add(process.host)
        for connection in list(self._connections):
            if process in (connection.client, connection.server):
                if power:
                    connection.break_off("connection reset by peer")
                else:
                    connection.darken(forever=True)

    def power_on(self, host: str) -> None:
        """The machine starts again: of its old connections it knows nothing."""
        if host in self._without_power:
            self._without_power.discard(host)
            for connection in list(self._connections):
                if connection.is_doomed and host in (connection.client.host, connection.server.host):
                    connection.break_off("connection reset by peer")

    @property
    def keepalive_s(self) -> float:
        shortest, longest = self._keepalive_s
        return shortest + self.rng.random() * (longest - shortest)


class Connection:
    """Between two processes, until it breaks. Each end is told once, by its own ``on_broken``."""

    kind = "rpc"

    def __init__(self, network: Network, client: Process, server: Process) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.is_open = True
        self.is_doomed = False
        self.on_broken: dict[Process, Callable[[str], None]] = {}
        self._pipes: list[Pipe] = []
        self._dark: asyncio.TimerHandle | None = None

    def pipe(self, source: Process) -> Pipe:
        """A way of its own for messages of ``source``."""
        pipe = Pipe(self, source, self.server if source is self.client else self.client)
        self._pipes.append(pipe)
        return pipe

    def drop(self, pipe: Pipe) -> None:
        if pipe in self._pipes:
            self._pipes.remove(pipe)

    @property
    def is_dark(self) -> bool:
        ends = (self.client, self.server)
        network = self.network
        return (
            self.is_doomed
            or any(end.state is State.PAUSED for end in ends)
            or network.is_blocked(self.client.host, self.server.host)
            or network.is_blocked(self.server.host, self.client.host)
        )

    def darken(self, *, forever: bool = False) -> None:
        """Nothing comes through any more, or nobody answers: keepalive finds out, unless it passes."""
        self.is_doomed = self.is_doomed or forever
        if self._dark is None and self.kind == "rpc":
            self._dark = self.network.loop.call_later(self.network.keepalive_s, self._keepalive_failed)

    def lighten(self) -> None:
        """Perhaps the way is free again: what was kept back goes on."""
        if self.is_dark:
            return
        if self._dark is not None:
            self._dark.cancel()
            self._dark = None
        for pipe in self._pipes:
            pipe.resume()

    def _keepalive_failed(self) -> None:
        self._dark = None
        self.break_off("keepalive watchdog timeout")

    def break_off(self, reason: str, *, by: Process | None = None) -> None:
        """The connection is over. ``by``: that end has closed it and needs not be told."""
        if not self.is_open:
            return
        self.is_open = False
        self.network.forget(self)
        if self._dark is not None:
            self._dark.cancel()
        network = self.network
        for end in (self.client, self.server):
            callback = self.on_broken.get(end)
            if end is by or callback is None or not end.is_alive:
                continue
            other = self.server if end is self.client else self.client
            delay_s = 0.0 if by is None else network.delay(other.host, end.host)
            network.loop.call_later(delay_s, callback, reason, context=end.context)


class Pipe:
    """Messages in one direction, in order. After the connection broke none arrives."""

    def __init__(self, connection: Connection, source: Process, target: Process) -> None:
        self._connection = connection
        self._network = connection.network
        self._source = source
        self._target = target
        self._last_s = 0.0
        self._kept: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def send(self, deliver: Callable[..., None], *args: Any, size_s: float = 0.0) -> None:
        """Runs ``deliver`` over there when the message has arrived. ``size_s``: what its length adds."""
        network = self._network
        if not self._connection.is_open or network.is_over:
            return
        delay_s = network.delay(self._source.host, self._target.host) + size_s
        when = max(network.loop.time() + delay_s, self._last_s + _GAP_S)
        self._last_s = when
        network.loop.call_at(when, self._arrive, deliver, args, context=self._target.context)

    def _arrive(self, deliver: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self._connection.is_open:
            return
        if self._kept or self._network.is_blocked(self._source.host, self._target.host):
            self._kept.append((deliver, args))
            return
        deliver(*args)

    def resume(self) -> None:
        if self._kept and self._connection.is_open:
            loop, context = self._network.loop, self._target.context
            loop.call_later(self._network.delay(self._source.host, self._target.host), self._flush, context=context)

    def _flush(self) -> None:
        if not self._connection.is_open or self._network.is_blocked(self._source.host, self._target.host):
            return
        kept, self._kept = self._kept, deque()
        for deliver, args in kept:
            deliver(*args)
