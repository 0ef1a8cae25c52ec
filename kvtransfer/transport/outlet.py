"""The sending end of a data-plane connection: takes blocks as they become ready, sends them in order, hears the verdicts.

The connection is made with the handshake, and again when there is something to send after it broke: what was under way is then
forgotten here, and the handoffs push it again. Blocks are hashed on a thread, a batch ahead of the socket.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from baton.kvtransfer.errors import RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.transport.base import Transport
from baton.kvtransfer.transport.frames import (
    MAX_ENTRIES,
    BlockEntry,
    FrameKind,
    Header,
    pack_blocks,
    pack_hello,
    parse_text,
    parse_verdicts,
)
from baton.kvtransfer.transport.stream import FrameStream, Outgoing, Payload

_log = structlog.get_logger(__name__)

# Bytes of blocks in one frame: a few milliseconds on a 10 Gbit/s link, so that verdicts and other handoffs get their turn.
_FRAME_BYTES = 4 * 1024 * 1024
# Bytes that may wait in the stream before the next batch is hashed: the socket never runs dry meanwhile.
_WINDOW_BYTES = 8 * 1024 * 1024
# Less than this is hashed at once on the event loop: a round trip to the thread takes longer.
_INLINE_BYTES = 512 * 1024
# Longest pause before connecting again to a peer that keeps closing the connection.
_MAX_BACKOFF_S = 1.0


@dataclass(frozen=True, slots=True)
class BlockPush:
    """One block to send: which of ours, and where to."""

    slot: Slot
    block_id: int


class OutletEvents(Protocol):
    """What an outlet reports to. Handoffs are named by their fence."""

    def on_sent(self, fence: bytes, blocks: tuple[tuple[int, int], ...]) -> None:
        """These blocks (index, checksum) have left."""
        ...

    def on_verdicts(self, fence: bytes, landed: tuple[int, ...], corrupt: tuple[int, ...]) -> None:
        """The receiver's word on blocks, by index."""
        ...

    def on_gone(self, fence: bytes, code: TransferCode, reason: str) -> None:
        """The receiver has given the handoff up."""
        ...

    def on_link_lost(self, reason: str) -> None:
        """The connection broke. Another one is made with the next push."""
        ...

    def on_unreachable(self, code: TransferCode, reason: str) -> None:
        """There is no connection to be had."""
        ...


@dataclass(slots=True, eq=False)
class _Batch:
    fence: bytes
    token: bytes
    blocks: Sequence[BlockPush]
    rows: list[int] = field(default_factory=list)
    outgoing: Outgoing | None = None
    when_quiet: Callable[[], None] | None = None  # set when it was cancelled while its rows were being read


class Outlet:
    """One peer's data plane, as the sender of blocks sees it."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        pair_fence: bytes,
        data_token: bytes,
        transport: Transport,
        memory: BlockMemory,
        executor: Executor,
        events: OutletEvents,
        options: TransferOptions,
    ) -> None:
        self.address = address
        self._hello = pack_hello(pair_fence, data_token)
        self._transport = transport
        self._memory = memory
        self._executor = executor
        self._events = events
        self._options = options
        self._queue: deque[_Batch] = deque()
        self._reading: _Batch | None = None  # its rows are being filled or hashed
        self._sending: dict[_Batch, None] = {}  # in the stream, in order
        self._lent: dict[bytes, dict[int, int]] = {}  # fence -> index -> row that the receiver may still read
        self._stream: FrameStream | None = None
        self._pump_task: asyncio.Task[None] | None = None
        self._drained = asyncio.Event()
        self._num_failures = 0  # connections in a row that brought no verdict
        self._is_closed = False

    def push(self, fence: bytes, token: bytes, blocks: Sequence[BlockPush]) -> None:
        """Sends blocks, in this order, after those before. ``on_sent`` follows for each unless the link is lost."""
        block_bytes = self._memory.block_bytes
        size = max(1, min(MAX_ENTRIES, _FRAME_BYTES // block_bytes, self._memory.max_rows))
        self._queue.extend(_Batch(fence, token, blocks[i : i + size]) for i in range(0, len(blocks), size))
        self._start_pump()

    def cancel(self, fence: bytes, when_quiet: Callable[[], None]) -> None:
        """Sends no more of a handoff. ``when_quiet`` is called, perhaps at once, when none of its blocks is being read here."""
        self._queue = deque(batch for batch in self._queue if batch.fence != fence)
        for batch in [batch for batch in self._sending if batch.fence == fence]:
            if self._stream is not None and batch.outgoing is not None:
                self._stream.cancel(batch.outgoing)
                batch.outgoing.on_sent = self._drained.set
            self._forget(batch)
        self._drained.set()
        self._memory.unload(list(self._lent.pop(fence, {}).values()))
        if self._reading is not None and self._reading.fence == fence:
            self._reading.when_quiet = when_quiet
        else:
            when_quiet()

    async def close(self) -> None:
        """Drops what is queued and ends the connection."""
        self._is_closed = True
        self._queue.clear()
        if self._stream is not None:
            self._stream.close()
            self._drop_link()
        if self._pump_task is not None:
            self._pump_task.cancel()
            await asyncio.wait([self._pump_task])

    # Sending.

    def _start_pump(self) -> None:
        if self._queue and self._pump_task is None and not self._is_closed:
            self._pump_task = asyncio.create_task(self._pump(), name="kv-outlet")

    async def _pump(self) -> None:
        try:
            while self._queue:
                if self._stream is None:
                    await self.connect()
                if self._queue and self._stream is not None:
                    await self._send_next(self._stream)
        except TransferError as error:
            self._queue.clear()
            self._events.on_unreachable(error.code, error.message)
        except Exception as error:  # whatever it was, those who wait for these blocks are told
            _log.exception("kv_outlet_failed", address=self.address)
            self._queue.clear()
            self._events.on_unreachable(TransferCode.INTERNAL, f"sending blocks failed: {error!r}")
        finally:
            self._pump_task = None
            self._start_pump()  # for what was pushed while the failure was told

    async def _send_next(self, stream: FrameStream) -> None:
        batch = self._reading = self._queue.popleft()
        is_read = False
        try:
            batch.rows = await self._memory.load([push.block_id for push in batch.blocks])
            checksums = await self._checksums(batch.rows)
            is_read = batch.when_quiet is None and stream is self._stream
        finally:
            self._reading = None
            if not is_read:
                self._memory.unload(batch.rows)
                if batch.when_quiet is not None:
                    batch.when_quiet()
        if not is_read:
            return
        parts = zip(batch.blocks, batch.rows, checksums, strict=True)
        entries = [BlockEntry(push.slot, checksum, row) for push, row, checksum in parts]
        frame = pack_blocks(self._transport.kind, batch.fence, batch.token, entries, self._memory.block_bytes)
        payload = [self._memory.rows.row(row) for row in batch.rows] if self._transport.is_inline else []
        self._sending[batch] = None
        sent = tuple((entry.slot.index, entry.checksum) for entry in entries)
        batch.outgoing = stream.send(frame, payload, lambda: self._on_sent(batch, sent))
        while stream is self._stream and stream.num_unsent > _WINDOW_BYTES:
            self._drained.clear()
            await self._drained.wait()

    async def _checksums(self, rows: list[int]) -> list[int]:
        if len(rows) * self._memory.block_bytes <= _INLINE_BYTES:
            return self._memory.rows.checksums(rows)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._memory.rows.checksums, rows)

    def _on_sent(self, batch: _Batch, blocks: tuple[tuple[int, int], ...]) -> None:
        if self._transport.is_inline:
            self._forget(batch)
        else:
            lent = self._lent.setdefault(batch.fence, {})
            lent.update({push.slot.index: row for push, row in zip(batch.blocks, batch.rows, strict=True)})
            self._sending.pop(batch, None)
        self._drained.set()
        self._events.on_sent(batch.fence, blocks)

    def _forget(self, batch: _Batch) -> None:
        self._sending.pop(batch, None)
        self._memory.unload(batch.rows)

    # The connection.

    async def connect(self) -> None:
        """Makes the connection. Raises TransferError when it cannot be had."""
        host, port = self.address
        if self._num_failures:
            await asyncio.sleep(min(_MAX_BACKOFF_S, 0.05 * 2**self._num_failures))
        self._num_failures += 1
        try:
            async with asyncio.timeout(self._options.connect_timeout_s):
                sock = await _connect(host, port)
        except (OSError, TimeoutError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or "no answer"
            raise TransferError(TransferCode.PEER_LOST, f"data plane {host}:{port}: {why}") from error
        self._stream = FrameStream(sock, self, stall_s=self._options.stall_s)
        self._stream.send(self._hello)

    def on_frame(self, header: Header, body: memoryview) -> Payload | None:
        match header.kind:
            case FrameKind.VERDICTS:
                self._num_failures = 0
                landed, corrupt = parse_verdicts(body)
                lent = self._lent.get(header.fence, {})
                self._memory.unload([lent.pop(index) for index in (*landed, *corrupt) if index in lent])
                self._events.on_verdicts(header.fence, landed, corrupt)
            case FrameKind.GONE:
                self._events.on_gone(header.fence, *parse_text(body))
            case FrameKind.CLOSE:
                code, reason = parse_text(body)
                if self._stream is not None:
                    self._stream.close()
                self._drop_link()
                self._events.on_unreachable(code, f"the receiver closed the data connection: {reason}")
            case _:
                raise RemoteProtocolError(f"a receiver sent {header.kind.name}")
        return None

    def on_lost(self, reason: str) -> None:
        self._drop_link()
        self._events.on_link_lost(reason)

    def _drop_link(self) -> None:
        self._stream = None
        self._queue.clear()
        for batch in list(self._sending):
            self._forget(batch)
        for lent in self._lent.values():
            self._memory.unload(list(lent.values()))
        self._lent.clear()
        self._drained.set()


async def _connect(host: str, port: int) -> socket.socket:
    """A connected, non-blocking socket. Raises OSError."""
    loop = asyncio.get_running_loop()
    error: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except OSError as failure:
            sock.close()
            error = failure
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise error
