"""One end of a data-plane connection: frames in and out of a non-blocking socket, without copying what they carry.

Sending takes views and hands them to the kernel as they are. Receiving reads a frame's header and body into a small buffer of
its own, shows them to the handler, and reads what follows straight into the memory that the handler names, nowhere before it
was named. Every callback moves a bounded number of bytes, so other work on the event loop is never kept waiting for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Protocol

import structlog

from baton.kvtransfer.errors import RemoteProtocolError
from baton.kvtransfer.transport.frames import HEADER_BYTES, MAX_BODY_BYTES, FrameKind, Header, pack_text, parse_header
from baton.kvtransfer.transport.tls import TLSSocket
from baton.kvtransfer.versions import WIRE_VERSIONS

_log = structlog.get_logger(__name__)

# Bytes moved in one callback: about 0.2 ms of copying in the kernel.
_TURN_BYTES = 1024 * 1024
# A payload's bytes are read when so many are there, not sooner: fewer turns of the event loop, and longer copies in each.
_LOW_WATER_BYTES = 128 * 1024
# How long a thread waits for room in the socket. A peer that keeps up makes some sooner; for another one the event loop waits.
_ROOM_WAIT_MS = 5
# Buffers in one system call; the kernel's own limit is 1024.
_MAX_BUFFERS = 256

_ZEROS = memoryview(bytes(1024 * 1024))


class Payload(Protocol):
    """Takes the bytes that follow a frame's body."""

    num_left: int

    def buffers(self, max_bytes: int, max_buffers: int) -> list[memoryview]:
        """Where the next bytes go. Empty: nowhere yet; the stream waits until ``resume`` is called."""
        ...

    def advance(self, num_bytes: int) -> None:
        """That many bytes are there."""
        ...

    def cut(self) -> None:
        """The connection ended; the rest will not come."""
        ...


class FrameHandler(Protocol):
    """What a stream reports to."""

    def on_frame(self, header: Header, body: memoryview) -> Payload | None:
        """A frame came. Returns who takes what follows it. Raises RemoteProtocolError to end the connection.

        ``body`` is only valid during the call.
        """
        ...

    def on_lost(self, reason: str) -> None:
        """The connection is over, for whatever reason but our own ``close``. Said once."""
        ...


class Outgoing:
    """One frame on its way out. The views of its payload must not change until all of it was sent."""

    def __init__(self, head: bytes, payload: Sequence[memoryview] = ()) -> None:
        self.views = deque((memoryview(head), *payload))
        self.is_partly_sent = False
        self.when_sent: Callable[[], None] | None = None
        self._num_payload = len(payload)

    @property
    def num_bytes(self) -> int:
        """What has not been sent yet."""
        return sum(map(len, self.views))

    def advance(self, num_sent: int) -> int:
        """Takes ``num_sent`` bytes off the front; returns how many of them were not this frame's."""
        while self.views and num_sent >= len(self.views[0]):
            num_sent -= len(self.views.popleft())
            self.is_partly_sent = True
        if self.views and num_sent:
            self.views[0] = self.views[0][num_sent:]
            self.is_partly_sent = True
            return 0
        self.is_partly_sent = self.is_partly_sent and bool(self.views)
        return num_sent

    def blank(self) -> None:
        """Lets go of the payload: what has not left is sent as zeros, since the length was promised."""
        head = [self.views.popleft()] if len(self.views) > self._num_payload else []
        num_left = self.num_bytes
        self.views = deque(head)
        while num_left:
            self.views.append(_ZEROS[:num_left])
            num_left -= len(self.views[-1])


class FrameStream:
    """Owns ``sock``, connected and non-blocking. ``stall_s``: a frame that does not move for so long ends the connection.

    ``version`` of the wire: frames of another one end the connection. None until the peer's first frame, which decides it.
    """

    def __init__(
        self, sock: socket.socket, handler: FrameHandler, *, stall_s: float, version: int | None = None
    ) -> None:
        self.version = version
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._tls = sock if isinstance(sock, TLSSocket) else None
        self._handler = handler
        self._scratch = memoryview(bytearray(HEADER_BYTES + MAX_BODY_BYTES))
        self._have = 0
        self._want = HEADER_BYTES
        self._header: Header | None = None
        self._payload: Payload | None = None
        self._is_paused = False
        self._outgoing: deque[Outgoing] = deque()
        self._is_writing = False
        self._is_held = False
        self._low_water_bytes = 1
        self._drained = asyncio.Event()
        self.is_closed = False
        self._stall_s = stall_s
        self._moved_s = self._loop.time()
        with contextlib.suppress(OSError):  # not on every kind of socket
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(sock.fileno(), self._on_readable)
        self._stall_timer = self._loop.call_later(stall_s / 2, self._check_stall)

    # Sending.

    def send(self, frame: Outgoing, when_sent: Callable[[], None] | None = None) -> None:
        """Queues a frame and sends what the socket takes at once. Nothing is sent, or called, once the stream is closed."""
        if self.is_closed:
            return
        frame.when_sent = when_sent
        if not self._outgoing:
            self._moved_s = self._loop.time()
        self._outgoing.append(frame)
        if not self._is_writing:
            self._on_writable()

    def cancel(self, frame: Outgoing) -> None:
        """The payload of a queued frame is read no more after this. ``when_sent`` is not called."""
        frame.when_sent = None
        if frame.is_partly_sent:
            frame.blank()
        elif frame in self._outgoing:
            self._outgoing.remove(frame)

    async def drain(self) -> None:
        """Waits until nothing is queued any more, or the stream is closed."""
        while self._has_unsent and not self.is_closed:
            self._drained.clear()
            await self._drained.wait()

    @property
    def _has_unsent(self) -> bool:
        return bool(self._outgoing) or (self._tls is not None and self._tls.has_unsent)

    def hold(self) -> None:
        """Until ``release``, ``send_now`` may be called on another thread, and ``send`` may not be called at all.

        Nothing is received meanwhile: so an answer to what was sent is never heard before the sending was told.
        """
        self._is_held = True
        if not self.is_closed and not self._is_paused:
            self._loop.remove_reader(self._sock.fileno())

    def release(self) -> None:
        self._is_held = False
        if self.is_closed:
            self._sock.close()
            return
        if not self._is_paused:
            self._watch_readable()
        if self._tls is not None and self._tls.has_unsent:
            self._watch_writable(True)

    def send_now(self, frame: Outgoing) -> None:
        """Sends as much of a frame as the socket takes, unless an earlier one is not out yet; ``send`` takes the rest.

        A broken connection is not reported here: the event loop sees it too.
        """
        with contextlib.suppress(OSError):
            while frame.views and not self._outgoing and not self.is_closed:
                try:
                    frame.advance(self._sock.sendmsg(list(islice(frame.views, _MAX_BUFFERS))))
                except (BlockingIOError, InterruptedError):
                    # Only a thread may wait: on the event loop everybody would wait with it.
                    if not self._is_held or not self._wait_for_room():
                        return

    def _wait_for_room(self) -> bool:
        room = select.poll()
        room.register(self._sock.fileno(), select.POLLOUT)
        return bool(room.poll(_ROOM_WAIT_MS))

    def _on_writable(self) -> None:
        try:
            self._write_some()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._lose(f"sending failed: {error.strerror or error}")
            return
        self._watch_writable(self._has_unsent and not self.is_closed)

    def _write_some(self) -> None:
        views: list[memoryview] = []
        num_bytes = 0
        for view in chain.from_iterable(frame.views for frame in self._outgoing):
            views.append(view)
            num_bytes += len(view)
            if num_bytes >= _TURN_BYTES or len(views) == _MAX_BUFFERS:
                break
        if not views and self._tls is not None:
            self._tls.flush()
        num_sent = self._sock.sendmsg(views) if views else 0
        self._moved_s = self._loop.time()
        sent: list[Outgoing] = []
        while self._outgoing:
            num_sent = self._outgoing[0].advance(num_sent)
            if self._outgoing[0].views:
                break
            sent.append(self._outgoing.popleft())
        if not self._has_unsent:
            self._drained.set()
        for frame in sent:
            if frame.when_sent is not None:
                frame.when_sent()

    def _watch_writable(self, wanted: bool) -> None:
        if wanted and not self._is_writing:
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        elif not wanted and self._is_writing and not self.is_closed:
            self._loop.remove_writer(self._sock.fileno())
        self._is_writing = wanted

    # Receiving.

    def resume(self) -> None:
        """The payload has room again."""
        if self._is_paused and not self.is_closed:
            self._is_paused = False
            self._moved_s = self._loop.time()
            if not self._is_held:
                self._watch_readable()

    def _watch_readable(self) -> None:
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        self._read_on()

    def _read_on(self) -> None:
        """What was decrypted, or waits to be, wakes nobody."""
        if self._tls is not None and self._tls.has_unread:
            self._loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        if self._is_held or self.is_closed:  # it was called for while neither was so
            return
        num_left = _TURN_BYTES
        try:
            while num_left > 0 and not self.is_closed and not self._is_paused:
                num_read = self._read_some(num_left)
                if num_read is None:
                    return
                num_left -= num_read
            if not self.is_closed and not self._is_paused:
                self._read_on()
        except (BlockingIOError, InterruptedError):
            if self._tls is not None and self._tls.has_unsent:  # of the handshake
                self._watch_writable(True)
        except OSError as error:
            self._lose(f"receiving failed: {error.strerror or error}")
        except RemoteProtocolError as error:
            self.refuse(error)
        except Exception:  # a mistake of ours: where the next frame begins is unknown now
            _log.exception("kv_frame_failed")
            self._lose("handling a frame failed")

    def _read_some(self, max_bytes: int) -> int | None:
        """Reads what one system call gives and acts on it. None: the stream is paused or over."""
        if self._payload is not None:
            buffers = self._payload.buffers(max_bytes, _MAX_BUFFERS)
            if not buffers:
                self._is_paused = True
                self._loop.remove_reader(self._sock.fileno())
                return None
            num_read = self._sock.recvmsg_into(buffers)[0]
        else:
            num_read = self._sock.recv_into(self._scratch[self._have : self._want])
        if num_read == 0:
            self._lose("the peer closed the connection")
            return None
        self._moved_s = self._loop.time()
        if self._payload is not None:
            payload = self._payload
            if num_read >= payload.num_left:
                self._payload = None
            payload.advance(num_read)
        else:
            self._have += num_read
            if self._have == self._want:
                self._end_of_part()
        self._set_low_water(1 if self._payload is None else min(_LOW_WATER_BYTES, self._payload.num_left))
        return num_read

    def _set_low_water(self, num_bytes: int) -> None:
        """The system wakes us when so many bytes are there, or the connection ended."""
        if num_bytes != self._low_water_bytes and not self.is_closed:
            self._low_water_bytes = num_bytes
            with contextlib.suppress(OSError):  # not on every kind of socket; then it wakes us more often
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)

    def _end_of_part(self) -> None:
        if self._header is None:
            header = parse_header(self._scratch[:HEADER_BYTES])
            self.version = self.version or header.version
            if header.version != self.version:
                raise RemoteProtocolError(f"frame version {header.version} on a connection that speaks {self.version}")
            if header.body_bytes:
                self._header, self._want = header, HEADER_BYTES + header.body_bytes
                return
        else:
            header = self._header
        body = self._scratch[HEADER_BYTES : self._want]
        self._header, self._have, self._want = None, 0, HEADER_BYTES
        self._payload = self._handler.on_frame(header, body)
        if self.is_closed and self._payload is not None:
            payload, self._payload = self._payload, None
            payload.cut()

    # Ending.

    def refuse(self, error: RemoteProtocolError) -> None:
        """Ends the connection because of what the peer did, and tells it why."""
        if not self.is_closed:
            with contextlib.suppress(OSError):
                version = self.version or WIRE_VERSIONS.oldest
                self._sock.send(pack_text(FrameKind.CLOSE, bytes(16), error.code, error.message, version))
        self._lose(error.message)

    def close(self) -> None:
        """Ends the connection. The handler is not told."""
        if self.is_closed:
            return
        self.is_closed = True
        self._stall_timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        if self._is_held:
            # Another thread may be about to use the descriptor, whose number must not be somebody else's by then.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        else:
            self._sock.close()
        self._outgoing.clear()
        self._drained.set()
        payload, self._payload = self._payload, None
        if payload is not None:
            payload.cut()

    def _lose(self, reason: str) -> None:
        if not self.is_closed:
            self.close()
            self._handler.on_lost(reason)

    def _check_stall(self) -> None:
        is_waiting = self._has_unsent or self._have > 0 or (self._payload is not None and not self._is_paused)
        if is_waiting and self._loop.time() - self._moved_s >= self._stall_s:
            self._lose(f"no byte moved for {self._stall_s:g} s in the middle of a frame")
            return
        if is_waiting:
            self._set_low_water(1)  # a slow link's few bytes are progress too
        self._stall_timer = self._loop.call_later(self._stall_s / 2, self._check_stall)
