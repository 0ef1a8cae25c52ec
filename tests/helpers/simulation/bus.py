"""NATS between simulated processes: fire and forget, with everything that can happen to it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import structlog
from helpers.simulation.clock import Process, current_process
from helpers.simulation.network import Network

from baton.services.runtime.bus import Handler

_log = structlog.get_logger(__name__)

# How long a client takes until it finds out that nobody answers, and to come back.
NOTICE_S = (0.1, 10.0)
RECONNECT_S = (0.05, 3.0)


class BusServer:
    """The NATS server. ``loss``: the share of messages that slow consumers lose."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.loss = 0.0
        self.is_up = True
        self.cut_off: set[str] = set()  # hosts that cannot reach it
        self._members: dict[SimBus, None] = {}

    def reaches(self, process: Process) -> bool:
        return self.is_up and process.host not in self.cut_off

    def join(self, member: SimBus) -> None:
        self._members[member] = None

    def leave(self, member: SimBus) -> None:
        self._members.pop(member, None)

    def forward(self, source: Process, subject: str, payload: bytes) -> None:
        if not self.reaches(source):
            return
        network = self.network
        for member in list(self._members):
            handlers = [handler for pattern, handler in member.subscriptions if _matches(pattern, subject)]
            if not handlers or not self.reaches(member.process) or not member.process.is_alive:
                continue
            if self.loss and network.rng.random() < self.loss:
                continue
            arrival_s = max(network.loop.time() + network.delay(source.host, "nats"), member.last_s + 1e-7)
            member.last_s = arrival_s
            network.loop.call_at(arrival_s, member.deliver, handlers, subject, payload, context=member.process.context)

    def stop(self) -> None:
        self.is_up = False
        for member in list(self._members):
            member.lose()

    def start(self) -> None:
        self.is_up = True
        for member in list(self._members):
            member.come_back()

    def cut(self, host: str) -> None:
        self.cut_off.add(host)
        for member in [member for member in self._members if member.process.host == host]:
            member.lose()

    def heal(self, host: str) -> None:
        self.cut_off.discard(host)
        for member in [member for member in self._members if member.process.host == host]:
            member.come_back()


class SimBus:
    """One process's connection to NATS. Implements Bus."""

    def __init__(self, server: BusServer) -> None:
        self.process = current_process()
        self.subscriptions: list[tuple[str, Handler]] = []
        self.last_s = 0.0
        self._server = server
        self._callbacks: list[Callable[[], None]] = []
        self._dropped: Counter[str] = Counter()
        self._is_connected = False

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    @property
    def num_dropped(self) -> Counter[str]:
        return self._dropped

    def publish(self, subject: str, payload: bytes) -> None:
        if not self._is_connected:
            self._dropped["disconnected"] += 1
            return
        self._server.forward(self.process, subject, payload)

    def subscribe(self, subject: str, handler: Handler) -> None:
        self.subscriptions.append((subject, handler))

    def on_connect(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self._is_connected:
            callback()

    async def start(self) -> None:
        self._server.join(self)
        self.come_back()

    async def close(self) -> None:
        self._is_connected = False
        self._server.leave(self)

    def deliver(self, handlers: list[Handler], subject: str, payload: bytes) -> None:
        if not self._is_connected:
            return
        for handler in handlers:
            try:
                handler(subject, payload)
            except Exception as error:
                _log.error("a bus handler failed", subject=subject, exc_info=error)

    def lose(self) -> None:
        """The server is gone or cannot be reached; the client notices after a while."""
        network = self._server.network
        network.loop.call_later(network.rng.uniform(*NOTICE_S), self._notice, context=self.process.context)

    def _notice(self) -> None:
        if self._server.reaches(self.process):
            return  # it came back before anybody noticed; what was published meanwhile is lost
        self._is_connected = False

    def come_back(self) -> None:
        network = self._server.network
        network.loop.call_later(network.rng.uniform(*RECONNECT_S), self._connect, context=self.process.context)

    def _connect(self) -> None:
        if self._is_connected or not self._server.reaches(self.process):
            return
        self._is_connected = True
        for callback in self._callbacks:
            callback()


@functools.cache
def _matches(pattern: str, subject: str) -> bool:
    wanted, tokens = pattern.split("."), subject.split(".")
    return len(wanted) == len(tokens) and all(p in ("*", t) for p, t in zip(wanted, tokens, strict=True))
