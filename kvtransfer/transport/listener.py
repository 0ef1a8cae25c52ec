"""The receiving end of the data plane: a listening socket, and an inlet for each connection to it.

A connection says in its first frame which pair of processes it belongs to and shows the pair's token, which only the peer was
told. Until then it is nobody's: there may be a fixed number of such connections, each for a short time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from typing import Protocol

import structlog

from baton.kvtransfer.errors import RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.identity import WorkerIdentity, pair_digest
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.transport.base import Source, Transport, detach
from baton.kvtransfer.transport.frames import FrameKind, Header, pack_text, pack_verdicts
from baton.kvtransfer.transport.sockets import SYSTEM_SOCKETS, Sockets
from baton.kvtransfer.transport.stream import FrameStream, Outgoing, Payload
from baton.kvtransfer.versions import WIRE_VERSIONS

_log = structlog.get_logger(__name__)

# Connections accepted in one turn of the event loop.
_MAX_ACCEPTS = 16
# Pause after the system refused us a descriptor: it will not have one a moment later.
_ACCEPT_PAUSE_S = 0.1


class IncomingPair:
    """What the receiver agreed on with one sender process in the handshake."""

    def __init__(
        self,
        sender: WorkerIdentity,
        receiver: WorkerIdentity,
        transport: Transport,
        source: Source | None,
        token: bytes,
        version: int,
    ):
        self.sender = sender
        self.fence = pair_digest(sender, receiver)
        self.transport = transport
        self.source = source
        self.token = token
        self.version = version  # of the wire
        self.inlets: list[Inlet] = []
        self.is_closed = False
        self.expiry: asyncio.TimerHandle | None = None  # runs while it has no connection

    def close(self) -> None:
        """Ends its connections and lets go of the sender's memory."""
        self.is_closed = True
        if self.expiry is not None:
            self.expiry.cancel()
        for inlet in list(self.inlets):
            inlet.close()
        source, self.source = self.source, None
        if source is not None:
            detach(self.transport, source)


class InletEvents(Protocol):
    """What inlets report to."""

    def find_pair(self, fence: bytes) -> IncomingPair | None:
        """The pair that a connection says it belongs to."""
        ...

    def on_disconnected(self, pair: IncomingPair) -> None:
        """The last connection of a pair is gone."""
        ...

    def on_push(self, inlet: Inlet, pair: IncomingPair, header: Header, body: memoryview) -> Payload | None:
        """Blocks were announced. Returns who reads what follows. Raises RemoteProtocolError to end the connection."""
        ...


class Inlet:
    """One connection from a sender."""

    def __init__(self, sock: socket.socket, listener: DataListener, options: TransferOptions) -> None:
        self._listener = listener
        self._options = options
        self._pair: IncomingPair | None = None
        self._stream = FrameStream(sock, self, stall_s=options.stall_s)
        refusal = RemoteProtocolError("no HELLO in time")
        self._hello_timer = asyncio.get_running_loop().call_later(options.hello_timeout_s, self._stream.refuse, refusal)

    @property
    def is_known(self) -> bool:
        """It has said who it is, and proved it."""
        return self._pair is not None

    @property
    def _version(self) -> int:
        return self._stream.version or WIRE_VERSIONS.oldest

    def send_verdicts(self, fence: bytes, landed: tuple[int, ...], corrupt: tuple[int, ...]) -> None:
        """Tells the sender what became of blocks."""
        self._stream.send(Outgoing(pack_verdicts(fence, landed, corrupt, self._version)))

    def send_gone(self, fence: bytes, code: TransferCode, reason: str) -> None:
        """Tells the sender that a handoff is over."""
        self._stream.send(Outgoing(pack_text(FrameKind.GONE, fence, code, reason, self._version)))

    def resume(self) -> None:
        """There is room again for what the connection was waiting with."""
        self._stream.resume()

    def on_frame(self, header: Header, body: memoryview) -> Payload | None:
        if self._pair is None:
            self._pair = self._authenticate(header)
            self._hello_timer.cancel()
            return None
        if header.kind is not self._pair.transport.kind:
            raise RemoteProtocolError(f"{header.kind.name} frame on a connection for {self._pair.transport.name}")
        return self._listener.events.on_push(self, self._pair, header, body)

    def _authenticate(self, header: Header) -> IncomingPair:
        if header.kind is not FrameKind.HELLO:
            raise RemoteProtocolError(f"{header.kind.name} before HELLO")
        pair = self._listener.events.find_pair(header.fence)
        token = pair.token if pair is not None else bytes(32)
        # The comparison is made in any case: how long the answer takes says nothing about which pairs exist.
        if not hmac.compare_digest(token, header.token) or pair is None:
            raise RemoteProtocolError("no handshake with these two processes, or another token", TransferCode.STALE)
        if header.version != pair.version:
            raise RemoteProtocolError(f"HELLO of version {header.version}; the handshake chose {pair.version}")
        if len(pair.inlets) >= self._options.max_connections_per_peer:
            pair.inlets[0].close()
        pair.inlets.append(self)
        return pair

    def on_lost(self, reason: str) -> None:
        self._forget()
        _log.debug("kv_connection_lost", peer=str(self._pair.sender) if self._pair else "unknown", reason=reason)

    def close(self) -> None:
        """Ends the connection; what is landing on it is cut short."""
        self._stream.close()
        self._forget()

    def _forget(self) -> None:
        self._hello_timer.cancel()
        self._listener.inlets.discard(self)
        if self._pair is not None and self in self._pair.inlets:
            self._pair.inlets.remove(self)
            if not self._pair.inlets:
                self._listener.events.on_disconnected(self._pair)


class DataListener:
    """Accepts data-plane connections on ``host:port`` (port 0: any free one)."""

    def __init__(
        self,
        host: str,
        port: int,
        events: InletEvents,
        options: TransferOptions,
        sockets: Sockets = SYSTEM_SOCKETS,
    ) -> None:
        self.events = events
        self.inlets: set[Inlet] = set()
        self._options = options
        self._loop = asyncio.get_running_loop()
        try:
            self._sock = sockets.listen(host, port)
        except OSError as error:
            raise TransferError(
                TransferCode.INTERNAL, f"data plane {host}:{port}: {error.strerror or error}"
            ) from error
        self.port: int = self._sock.getsockname()[1]
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._sock.fileno(), self._on_acceptable)

    def close(self) -> None:
        """Stops listening and ends every connection."""
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for inlet in list(self.inlets):
            inlet.close()

    def _on_acceptable(self) -> None:
        for _ in range(_MAX_ACCEPTS):
            try:
                sock, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("kv_accept_failed", reason=error.strerror)
                self._loop.remove_reader(self._sock.fileno())
                self._pause = self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)
                return
            if sum(not inlet.is_known for inlet in self.inlets) >= self._options.max_unknown_connections:
                with contextlib.suppress(OSError):
                    sock.close()
                continue
            sock.setblocking(False)
            self.inlets.add(Inlet(sock, self, self._options))

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._on_acceptable)
