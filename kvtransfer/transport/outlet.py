"""The sending end of a data-plane connection: takes blocks as they become ready, sends them in order, hears the verdicts.

The connection is made with the handshake, and again when there is something to send after it broke: what was under way is then
forgotten here, and the handoffs push it again. Blocks are hashed on a thread, a batch ahead of the socket.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

import structlog

from baton.kvtransfer import failpoint
from baton.kvtransfer.crew import Crew, in_pieces, share
from baton.kvtransfer.errors import RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.transport.base import Transport
from baton.kvtransfer.transport.frames import (
    FrameKind,
    Header,
    max_entries,
    pack_blocks,
    pack_hello,
    parse_text,
    parse_verdicts,
)
from baton.kvtransfer.transport.sockets import SYSTEM_SOCKETS, Sockets
from baton.kvtransfer.transport.stream import FrameStream, Outgoing, Payload
from baton.kvtransfer.versions import WIRE_VERSIONS

_log = structlog.get_logger(__name__)

# Bytes of blocks in one frame. Inline: a few milliseconds on a 10 Gbit/s link, then verdicts and other handoffs get their
# turn. Taken from our memory: a few milliseconds of hashing, then the receiver begins to copy.
_INLINE_FRAME_BYTES = 4 * 1024 * 1024
_FRAME_BYTES = 16 * 1024 * 1024
# Bytes of blocks hashed and sent in one go, for each thread that hashes. It begins small, so that the receiver soon has
# something to do, and grows while there is more, so that handing work over to the thread and back costs little. A few
# milliseconds at most.
_FIRST_GO_BYTES = 1024 * 1024
_MAX_GO_BYTES = 32 * 1024 * 1024
_MAX_INLINE_GO_BYTES = 8 * 1024 * 1024
# Less than this is done at once on the event loop: a round trip to the thread takes longer.
_INLINE_BYTES = 512 * 1024
# Longest pause before connecting again to a peer that keeps closing the connection.
_MAX_BACKOFF_S = 1.0


class BlockPush(NamedTuple):
    """One block to send: which of ours, and where to."""

    slot: Slot
    block_id: int


Pushes = Sequence[tuple[Slot, int]]
"""Blocks to send, each like a BlockPush."""


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
    """Blocks of one handoff: as many as were pushed together while queued, one frame's later."""

    fence: bytes
    token: bytes
    blocks: Pushes
    rows: list[int] = field(default_factory=list)
    frame: Outgoing | None = None
    sent: tuple[tuple[int, int], ...] = ()  # (index, checksum)


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
        sockets: Sockets = SYSTEM_SOCKETS,
        version: int = WIRE_VERSIONS.newest,
    ) -> None:
        self.address = address
        self._version = version
        self._sockets = sockets
        self._hello = pack_hello(pair_fence, data_token, version)
        self._transport = transport
        self._memory = memory
        self._executor = executor
        self._events = events
        self._options = options
        self._queue: deque[_Batch] = deque()
        self._reading: list[_Batch] = []  # their rows are being filled, hashed or sent on a thread
        self._when_quiet: dict[bytes, Callable[[], None]] = {}  # by fence: what was cancelled while being read
        self._sending: dict[_Batch, None] = {}  # waiting in the stream, in order
        self._lent: dict[bytes, dict[int, int]] = {}  # fence -> index -> row that the receiver may still read
        self._stream: FrameStream | None = None
        self._pump_task: asyncio.Task[None] | None = None
        self._num_failures = 0  # connections in a row that brought no verdict
        self._is_closed = False

    def push(self, fence: bytes, token: bytes, blocks: Pushes) -> None:
        """Sends blocks, in this order, after those before. ``on_sent`` follows for each unless the link is lost."""
        self._queue.append(_Batch(fence, token, blocks))
        self._start_pump()

    def cancel(self, fence: bytes, when_quiet: Callable[[], None]) -> None:
        """Sends no more of a handoff. ``when_quiet`` is called, perhaps at once, when none of its blocks is being read here."""
        self._queue = deque(batch for batch in self._queue if batch.fence != fence)
        for batch in [batch for batch in self._sending if batch.fence == fence]:
            if self._stream is not None and batch.frame is not None:
                self._stream.cancel(batch.frame)
            self._forget(batch)
        self._memory.unload(list(self._lent.pop(fence, {}).values()))
        if any(batch.fence == fence for batch in self._reading):
            self._when_quiet[fence] = when_quiet
        else:
            when_quiet()

    def break_off(self, reason: str) -> None:
        """The connection is of no use although it stands: as if it had broken."""
        if self._stream is not None:
            self._stream.close()
            self.on_lost(reason)

    async def close(self) -> None:
        """Drops what is queued and ends the connection."""
        self._is_closed = True
        self._queue.clear()
        if self._stream is not None:
            self._stream.close()
            self._drop_link()
        if self._pump_task is not None:
            if not self._reading:  # what a thread has begun is waited for
                self._pump_task.cancel()
            await asyncio.wait([self._pump_task])

    # Sending.

    def _start_pump(self) -> None:
        if self._queue and self._pump_task is None and not self._is_closed:
            self._pump_task = asyncio.create_task(self._pump(), name="kv-outlet")

    async def _pump(self) -> None:
        num_threads = self._executor.num_threads if isinstance(self._executor, Crew) else 1
        go_bytes = _FIRST_GO_BYTES * num_threads
        max_go_bytes = _MAX_INLINE_GO_BYTES if self._transport.is_inline else _MAX_GO_BYTES * num_threads
        try:
            while self._queue:
                if self._stream is None:
                    await self.connect()
                if self._queue and self._stream is not None:
                    await self._send_some(self._stream, self._take(go_bytes))
                    go_bytes = min(max_go_bytes, 4 * go_bytes)
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

    @property
    def max_frame_bytes(self) -> int:
        """Of blocks in one frame, unless one is larger. They are judged together."""
        return _INLINE_FRAME_BYTES if self._transport.is_inline else _FRAME_BYTES

    def _take(self, max_bytes: int) -> list[_Batch]:
        """The next frames, of at most ``max_bytes`` together. With staging one: two would wait for each other's rows."""
        block_bytes, taken = self._memory.block_bytes, []
        num_left = max(1, max_bytes // block_bytes)
        largest = max(1, min(max_entries(self._version), self._memory.max_rows, self.max_frame_bytes // block_bytes))
        while self._queue and num_left > 0:
            batch = self._queue[0]
            size = min(num_left, largest)
            taken.append(_Batch(batch.fence, batch.token, batch.blocks[:size]))
            num_left -= len(taken[-1].blocks)
            batch.blocks = batch.blocks[size:]
            if not batch.blocks:
                self._queue.popleft()
            if self._memory.is_staged:
                break
        return taken

    async def _send_some(self, stream: FrameStream, batches: list[_Batch]) -> None:
        self._reading = batches
        try:
            for batch in batches:
                batch.rows = await self._memory.load([block_id for _, block_id in batch.blocks])
            if sum(len(batch.rows) for batch in batches) * self._memory.block_bytes <= _INLINE_BYTES:
                self._hash_and_send(stream, batches)
            else:
                stream.hold()  # not while waiting for rows: verdicts give them back
                try:
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(self._executor, self._hash_and_send, stream, batches)
                finally:
                    stream.release()
        finally:
            self._reading = []
            self._conclude(stream, batches)
        await stream.drain()

    def _hash_and_send(self, stream: FrameStream, batches: list[_Batch]) -> None:
        """Each frame is sent while what was read for its checksums is still in the cache. Runs on any thread.

        Other threads help to hash; frames go out in their order all the same, and none of the helpers is at it any more when
        this returns.
        """
        row_bytes = self._memory.block_bytes
        parts = [(batch, in_pieces(batch.rows, row_bytes)) for batch in batches]
        pieces = [partial(self._hash, batch, rows) for batch, split in parts for rows in split]
        has_rest = False
        with closing(share(self._executor, pieces)) as hashed:
            for batch, split in parts:
                checksums = [checksum for part in islice(hashed, len(split)) for checksum in part]
                if len(checksums) < len(batch.rows) or batch.fence in self._when_quiet:
                    continue  # cancelled meanwhile
                failpoint.reach("kv.send.frame_k")
                self._pack(batch, checksums)
                if not has_rest:
                    assert batch.frame is not None
                    stream.send_now(batch.frame)
                    has_rest = bool(batch.frame.views)

    def _hash(self, batch: _Batch, rows: Sequence[int]) -> list[int]:
        """Nothing for what was cancelled meanwhile."""
        is_wanted = batch.fence not in self._when_quiet and not self._is_closed
        return self._memory.rows.checksums(rows) if is_wanted else []

    def _pack(self, batch: _Batch, checksums: list[int]) -> None:
        slots = [slot for slot, _ in batch.blocks]
        entries = zip(slots, checksums, batch.rows, strict=True)
        head = pack_blocks(
            self._transport.kind, batch.fence, batch.token, entries, self._memory.block_bytes, self._version
        )
        payload = self._memory.rows.spans(batch.rows) if self._transport.is_inline else []
        batch.sent = tuple(zip([slot.index for slot in slots], checksums, strict=True))
        batch.frame = Outgoing(head, payload)

    def _conclude(self, stream: FrameStream, batches: list[_Batch]) -> None:
        """What was sent is told; what the socket did not take waits in the stream; what was cancelled is let go."""
        sent: list[_Batch] = []
        rest: list[tuple[_Batch, Outgoing]] = []
        for batch in batches:
            if stream is not self._stream or batch.frame is None or batch.fence in self._when_quiet:
                self._memory.unload(batch.rows)
                if stream is self._stream and batch.frame is not None and batch.frame.is_partly_sent:
                    batch.frame.blank()
                    rest.append((batch, batch.frame))
            elif batch.frame.views:
                self._sending[batch] = None
                rest.append((batch, batch.frame))
            else:
                sent.append(batch)
        self._on_sent(sent)  # before the rest, which may be sent at once: blocks are told in their order
        for batch, frame in rest:
            if batch in self._sending:
                stream.send(frame, partial(self._on_sent, [batch]))
            elif frame.is_partly_sent:  # cancelled: blank, but its length was promised
                stream.send(frame)
        when_quiet, self._when_quiet = self._when_quiet, {}
        for callback in when_quiet.values():
            callback()

    def _on_sent(self, batches: Sequence[_Batch]) -> None:
        sent: dict[bytes, tuple[tuple[int, int], ...]] = {}
        for batch in batches:
            if self._transport.is_inline:
                self._forget(batch)
            else:
                self._sending.pop(batch, None)
                lent = self._lent.setdefault(batch.fence, {})
                lent.update(zip([index for index, _ in batch.sent], batch.rows, strict=True))
            sent[batch.fence] = sent.get(batch.fence, ()) + batch.sent
        for fence, blocks in sent.items():
            self._events.on_sent(fence, blocks)

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
                sock = await self._sockets.connect(host, port)
        except (OSError, TimeoutError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or "no answer"
            raise TransferError(TransferCode.PEER_LOST, f"data plane {host}:{port}: {why}") from error
        self._stream = FrameStream(sock, self, stall_s=self._options.stall_s, version=self._version)
        self._stream.send(Outgoing(self._hello))

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
