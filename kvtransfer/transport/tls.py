"""The data plane's sockets with TLS: blocks are users' prompts.

What encrypts works on memory; what is encrypted goes to the kernel and comes from it in large pieces. A socket of this kind
has the methods of a plain one that the data plane uses, and two questions more: whether it holds bytes that the system does
not know of, in either direction. The side that accepts shakes hands while it reads: time and number of connections that have
not said who they are are bounded anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from baton.kvtransfer.errors import RemoteProtocolError, TransferCode
from baton.kvtransfer.transport.sockets import SystemSockets

# Bytes encrypted before the kernel is asked to take them, and read from it before they are decrypted.
_PIECE_BYTES = 256 * 1024
# One record and what is around it: so much may have been read already of what the system is asked to wait for.
_RECORD_BYTES = 17 * 1024
_HANDSHAKE_READ_BYTES = 16 * 1024
_ENDED = "the peer closed the connection in the TLS handshake"

Shown = Mapping[str, Any]
"""A peer's certificate, as ``ssl`` describes it."""


@dataclass(frozen=True, slots=True)
class TLSIdentity:
    """What the data plane shows and asks for. Contexts are asked for with each connection: they may have changed."""

    server: Callable[[], ssl.SSLContext]
    client: Callable[[], ssl.SSLContext]
    server_name: str  # in the certificate of whoever accepts
    refusal: Callable[[Shown], str | None]  # why this peer may not; None: it may
    on_refused: Callable[[str, str], None]  # address and reason, of a peer that was refused


class TLSSocket:
    """Owns ``sock``, connected and non-blocking. Raises what a plain one does; ``ssl.SSLError`` is an OSError."""

    def __init__(self, sock: socket.socket, identity: TLSIdentity, *, accepts: bool) -> None:
        self._sock = sock
        self._identity = identity
        self._accepts = accepts
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = identity.server() if accepts else identity.client()
        name = None if accepts else identity.server_name
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=accepts, server_hostname=name)
        self._is_open = False  # the handshake is over, and the peer may be here
        self._unsent = memoryview(b"")  # encrypted, and not taken by the kernel yet
        self._cipher = bytearray(_PIECE_BYTES)
        self._lock = threading.Lock()  # a thread may send while the event loop still writes

    @property
    def has_unread(self) -> bool:
        """Bytes were read from the system that nobody has had yet: it will not say that there is something to read."""
        return self._incoming.pending > 0 or self._tls.pending() > 0

    @property
    def has_unsent(self) -> bool:
        """Bytes that counted as sent wait for room in the socket."""
        return len(self._unsent) > 0 or self._outgoing.pending > 0

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        """Takes at most one piece, once the one before has left."""
        with self._lock:
            self._flush()
            if not self._is_open:
                self._shake_hands()
            num_sent = 0
            for buffer in buffers:
                room = _PIECE_BYTES - num_sent
                if room <= 0:
                    break
                num_sent += self._encrypt(buffer[:room])
            with contextlib.suppress(
                BlockingIOError, InterruptedError
            ):  # it was taken, and goes out before anything else does
                self._flush()
            return num_sent

    def send(self, data: bytes) -> int:
        return self.sendmsg([memoryview(data)])

    def flush(self) -> None:
        """Sends what has not left. Raises BlockingIOError where there is no room for all of it."""
        with self._lock:
            self._flush()

    def recv_into(self, buffer: memoryview) -> int:
        return self.recvmsg_into([buffer])[0]

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> tuple[int, list[Any], int, Any]:
        """Like a socket's: 0 bytes are the end. What the system has is read until the buffers are full."""
        with self._lock:
            if not self._is_open:
                self._shake_hands()
            num_read = 0
            try:
                for buffer in buffers:
                    filled = 0
                    while filled < len(buffer):
                        count = self._decrypt(buffer[filled:])
                        if count == 0:
                            return num_read, [], 0, None
                        filled += count
                        num_read += count
            except (BlockingIOError, InterruptedError):
                if num_read == 0:
                    raise
            return num_read, [], 0, None

    async def shake_hands(self) -> None:
        """For the side that connects. Raises OSError when the other one is not who it should be, or takes us for nobody."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._shake_hands()
            except (BlockingIOError, InterruptedError):
                received = await loop.sock_recv(self._sock, _HANDSHAKE_READ_BYTES)
                if not received:
                    raise ConnectionResetError(errno.ECONNRESET, _ENDED) from None
                self._incoming.write(received)
            else:
                return

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT):
            value = max(1, value - _RECORD_BYTES)
        self._sock.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        self._sock.shutdown(how)

    def close(self) -> None:
        """No word of farewell: frames say how long they are."""
        self._sock.close()

    # Under the lock.

    def _shake_hands(self) -> None:
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._flush()
                    if self._fill() == 0:
                        raise ConnectionResetError(errno.ECONNRESET, _ENDED) from None
            self._flush()
        except ssl.SSLError as error:
            self._tell_why()
            self._refuse(_in_words(error))
            raise
        reason = self._identity.refusal(self._tls.getpeercert() or {})
        self._is_open = True
        if reason is not None:
            self._refuse(reason)
            raise RemoteProtocolError(reason, TransferCode.PROTOCOL)

    def _refuse(self, reason: str) -> None:
        try:
            address = str(self._sock.getpeername()[0])
        except OSError:
            address = "unknown"
        self._identity.on_refused(address, reason)

    def _tell_why(self) -> None:
        """OpenSSL has put an alert for the peer in the way out."""
        with contextlib.suppress(OSError):
            self._flush()

    def _encrypt(self, buffer: memoryview) -> int:
        num_taken = 0
        while num_taken < len(buffer):
            num_taken += self._tls.write(buffer[num_taken:])
        return num_taken

    def _decrypt(self, buffer: memoryview) -> int:
        while True:
            try:
                count: Any = self._tls.read(len(buffer), cast(bytearray, buffer))  # with a buffer it returns how many
                return int(count)
            except ssl.SSLWantReadError:
                if self._fill() == 0:
                    return 0
            except ssl.SSLZeroReturnError:
                return 0

    def _fill(self) -> int:
        count = self._sock.recv_into(self._cipher)
        self._incoming.write(memoryview(self._cipher)[:count])
        return count

    def _flush(self) -> None:
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
                if not self._unsent:
                    return
            self._unsent = self._unsent[self._sock.send(self._unsent) :]


class _TLSListener(socket.socket):
    """Accepts TLS."""

    identity: TLSIdentity

    def accept(self) -> tuple[Any, Any]:
        sock, address = super().accept()
        sock.setblocking(False)
        try:
            return TLSSocket(sock, self.identity, accepts=True), address
        except BaseException:
            sock.close()
            raise


class TLSSockets(SystemSockets):
    """The system's, with TLS."""

    def __init__(self, identity: TLSIdentity) -> None:
        self._identity = identity

    def listen(self, host: str, port: int) -> socket.socket:
        plain = super().listen(host, port)
        listener = _TLSListener(plain.family, plain.type, plain.proto, fileno=plain.detach())
        listener.setblocking(False)
        listener.identity = self._identity
        return listener

    async def connect(self, host: str, port: int) -> Any:
        sock = await super().connect(host, port)
        try:
            tls = TLSSocket(sock, self._identity, accepts=False)
            await tls.shake_hands()
        except RemoteProtocolError as error:
            sock.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, error.message) from error
        except ssl.SSLError as error:
            sock.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"no TLS with the peer: {_in_words(error)}") from error
        except BaseException:
            sock.close()
            raise
        return tls


def _in_words(error: ssl.SSLError) -> str:
    """The cause, and where there is one, what to do."""
    reason = getattr(error, "verify_message", "") or (error.reason or str(error)).replace("_", " ").lower()
    if error.reason in ("HTTP_REQUEST", "WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"):
        return f"the peer does not speak TLS ({reason}); give it --tls-cert-file as well"
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the peer shows no certificate"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is refused: {reason}"
    return f"the peer refuses, or breaks off, the handshake: {reason}"
