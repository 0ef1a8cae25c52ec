"""A TCP proxy that makes a link misbehave while real processes talk over it.

A proxy stands in front of one listener. What it does is looked up, for every piece that passes, in a ``FaultBoard`` by the
link's name, ``SOURCE>TARGET:KIND`` ("prefill-0>decode-1:kv"), so faults come and go at run time. Pieces are what the
protocol is made of where the proxy knows it (frames of the KV data plane, messages of NATS), else whatever was read.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from helpers.link_pieces import Piece, splitter

Direction = Literal["forth", "back", "both"]

_WRITE_BYTES = 16 * 1024  # written at once where a rate is kept
_SWAP_WAIT_S = 0.2  # a piece that waits for the one behind it waits this long


@dataclass(eq=False)
class Fault:
    """What is done to a link. Everything is off unless it is set.

    Bytes are counted over each connection anew, pieces over all of them together, both from client to server. "Every n"
    faults meet every n-th piece that counts: one with payload on the data plane, a publication on NATS.
    """

    delay_s: float = 0.0  # each piece is this late; the next ones do not wait for it
    rate_bytes_s: float = 0.0  # at most so much
    stall: bool = False  # nothing passes, nothing is closed
    stall_after_bytes: int | None = None  # the connection's rest
    direction: Direction = "both"  # of the three above
    refuse: bool = False  # connections are reset, those that are there too
    cut_after_bytes: int | None = None
    cut_after_pieces: int | None = None
    fin: bool = False  # a cut is an orderly end, not a reset
    flip_at_byte: int | None = None
    flip_every: int = 0  # one bit of the payload, anywhere in it
    duplicate_every: int = 0
    drop_every: int = 0
    swap_every: int = 0  # with the piece behind it
    max_times: int | None = None  # of each of the faults that are counted in ``done``; then no more
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)  # what has been done so far
    num_pieces: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def take(self, what: str) -> bool:
        """Counts one ``what``. False when it has been done often enough."""
        if self.max_times is not None and self.done[what] >= self.max_times:
            return False
        self.done[what] += 1
        return True

    def is_turn(self, every: int) -> bool:
        """Whether the piece that was counted last is every n-th."""
        return every > 0 and self.num_pieces % every == 0


class FaultBoard:
    """Which links have which faults now."""

    def __init__(self) -> None:
        self._faults: list[tuple[str, Fault]] = []
        self._changed = asyncio.Event()
        self.num_pieces: Counter[str] = Counter()  # that counted, by link

    def set(self, pattern: str, fault: Fault) -> Fault:
        """Puts a fault on every link whose name matches."""
        self._faults.append((pattern, fault))
        self._change()
        return fault

    def clear(self, pattern: str | None = None) -> None:
        """Takes the faults off that were set for exactly ``pattern``; without one, all."""
        self._faults = [(own, fault) for own, fault in self._faults if pattern is not None and own != pattern]
        self._change()

    def on(self, link: str) -> list[Fault]:
        return [fault for pattern, fault in self._faults if fnmatchcase(link, pattern)]

    def pieces(self, pattern: str) -> int:
        """How many pieces that count have come in on the links that match."""
        return sum(number for link, number in self.num_pieces.items() if fnmatchcase(link, pattern))

    async def change(self) -> None:
        """Returns at the next change."""
        await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Cut(Exception):
    """The connection is to be broken now."""

    def __init__(self, *, is_fin: bool) -> None:
        super().__init__()
        self.is_fin = is_fin


class FaultProxy:
    """Listens on ``port`` for connections to ``target``. ``who`` tells a client by its port."""

    def __init__(
        self,
        board: FaultBoard,
        name: str,
        kind: str,
        target: tuple[str, int] = ("", 0),
        who: Callable[[int], str] = lambda port: "client",
    ) -> None:
        self.board, self.name, self.kind, self.target, self.who = board, name, kind, target, who
        self.port = 0
        self.num_connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Connections that have not ended."""
        return len(self._tasks)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        is_fin = False
        try:
            self.num_connections += 1
            link = f"{self.who(writer.get_extra_info('peername')[1])}>{self.name}:{self.kind}"
            self._check_open(link)
            there_reader, there_writer = await asyncio.open_connection(*self.target)
            ends.append(there_writer)
            await self._serve(link, _Way(reader, there_writer), _Way(there_reader, writer))
            is_fin = True
        except Cut as cut:
            is_fin = cut.is_fin
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in ends:
                _end(end, is_fin=is_fin)
            self._tasks.discard(task)

    async def _serve(self, link: str, forth: _Way, back: _Way) -> None:
        work = [
            asyncio.ensure_future(self._read(link, forth, is_forth=True)),
            asyncio.ensure_future(self._read(link, back, is_forth=False)),
            asyncio.ensure_future(self._write(link, forth, "forth")),
            asyncio.ensure_future(self._write(link, back, "back")),
            asyncio.ensure_future(self._watch(link)),
        ]
        try:
            # A reader that is at its end leaves the rest to its writer; any other end is the connection's.
            done: set[asyncio.Future[None]] = set()
            while not done - set(work[:2]) and not any(task.exception() for task in done):
                done, _ = await asyncio.wait(
                    [task for task in work if not task.done()], return_when=asyncio.FIRST_COMPLETED
                )
            for task in done:
                task.result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    def _check_open(self, link: str) -> None:
        for fault in self.board.on(link):
            if fault.refuse:
                fault.take("refuse")
                raise Cut(is_fin=fault.fin)

    async def _watch(self, link: str) -> None:
        while True:
            self._check_open(link)
            await self.board.change()

    async def _read(self, link: str, way: _Way, *, is_forth: bool) -> None:
        """Reads pieces, does to them what is to be done, and queues them for the writer."""
        async for piece in splitter(self.kind if is_forth else "bytes")(way.reader):
            faults = self.board.on(link)
            if is_forth:
                for result in self._spoil(link, way, piece, faults):
                    way.put(result, self._delay_s(faults, "forth"))
            else:
                way.put(piece.data, self._delay_s(faults, "back"))
            await way.room()
        way.put(None, 0.0)

    def _spoil(self, link: str, way: _Way, piece: Piece, faults: list[Fault]) -> Iterator[bytes]:
        start, way.num_bytes = way.num_bytes, way.num_bytes + len(piece.data)
        data = bytearray(piece.data)
        copies, is_swapped = 1, False
        if piece.counts:
            self.board.num_pieces[link] += 1
        for fault in faults:
            if piece.counts:
                fault.num_pieces += 1
            if fault.flip_at_byte is not None and start <= fault.flip_at_byte < way.num_bytes and fault.take("flip"):
                data[fault.flip_at_byte - start] ^= 0x40
            if not piece.counts:
                continue
            if piece.payload_bytes and fault.is_turn(fault.flip_every) and fault.take("flip"):
                data[-fault.random.randint(1, piece.payload_bytes)] ^= 1 << fault.random.randrange(8)
            if fault.is_turn(fault.drop_every) and fault.take("drop"):
                copies = 0
            elif fault.is_turn(fault.duplicate_every) and fault.take("duplicate"):
                copies += 1
            elif fault.is_turn(fault.swap_every) and way.held is None and fault.take("swap"):
                is_swapped = True
        for fault in faults:
            self._cut(way, fault, piece, start, bytes(data))
        if is_swapped:
            way.hold(bytes(data))
            return
        for _ in range(copies):
            yield bytes(data)
        if way.held is not None:
            yield way.release()

    def _cut(self, way: _Way, fault: Fault, piece: Piece, start: int, data: bytes) -> None:
        limit = fault.cut_after_bytes
        if limit is not None and start + len(data) > limit and fault.take("cut"):
            way.put(data[: max(0, limit - start)], 0.0)
            way.put(Cut(is_fin=fault.fin), 0.0)
        frames = fault.cut_after_pieces
        if frames is not None and piece.counts and fault.num_pieces > frames and fault.take("cut"):
            way.put(data[: len(data) // 2], 0.0)  # in the middle of it
            way.put(Cut(is_fin=fault.fin), 0.0)

    async def _write(self, link: str, way: _Way, direction: Direction) -> None:
        num_written = 0
        while True:
            item = await way.get()
            if item is None:
                await self._let_pass(link, way, direction, num_written)
                return
            if isinstance(item, Cut):
                raise item
            while item:
                part = item[: self._size_at(link, num_written)]
                item = item[len(part) :]
                await self._let_pass(link, way, direction, num_written + len(part))
                way.writer.write(part)
                await way.writer.drain()
                num_written += len(part)
                rates = [f.rate_bytes_s for f in self.board.on(link) if f.rate_bytes_s and _is_on(f, direction)]
                if rates:
                    await asyncio.sleep(len(part) / min(rates))

    def _size_at(self, link: str, num_written: int) -> int:
        """How much is written at once: not beyond where a stall begins."""
        limits = [fault.stall_after_bytes for fault in self.board.on(link) if fault.stall_after_bytes is not None]
        return min([_WRITE_BYTES, *(limit - num_written for limit in limits if limit > num_written)])

    async def _let_pass(self, link: str, way: _Way, direction: Direction, num_bytes: int) -> None:
        """Waits while a stall is on."""
        while any(way.is_stalled(fault, direction, num_bytes) for fault in self.board.on(link)):
            await self.board.change()

    def _delay_s(self, faults: list[Fault], direction: Direction) -> float:
        return max((fault.delay_s for fault in faults if _is_on(fault, direction)), default=0.0)


class _Way:
    """One direction of a connection: what was read and not yet written, and when it is due."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.num_bytes = 0
        self.held: bytes | None = None
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[float, bytes | Cut | None]] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._release_timer: asyncio.TimerHandle | None = None
        self._stalls: dict[Fault, bool] = {}  # those that met this connection, and whether they were still to be done

    def put(self, item: bytes | Cut | None, delay_s: float) -> None:
        if item is None and self.held is not None:
            self._items.append((0.0, self.release()))
        self._items.append((self._loop.time() + delay_s, item))
        self._filled.set()

    async def room(self) -> None:
        """Back-pressure: not more than a few pieces lie here, unless they are delayed."""
        while len(self._items) > 16 and self._items[0][0] <= self._loop.time():
            self._emptied.clear()
            await self._emptied.wait()

    async def get(self) -> bytes | Cut | None:
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        due_s, item = self._items[0]
        if due_s > (now_s := self._loop.time()):
            await asyncio.sleep(due_s - now_s)
        self._items.popleft()
        self._emptied.set()
        return item

    def is_stalled(self, fault: Fault, direction: Direction, num_bytes: int) -> bool:
        if fault.stall:
            return _is_on(fault, direction)
        if fault.stall_after_bytes is None or direction != "forth" or num_bytes <= fault.stall_after_bytes:
            return False
        if fault not in self._stalls:
            self._stalls[fault] = fault.take("stall")
        return self._stalls[fault]

    def hold(self, data: bytes) -> None:
        """Until the next piece has gone; or a moment, where none comes."""
        self.held = data
        self._release_timer = self._loop.call_later(_SWAP_WAIT_S, self._give_up_waiting)

    def release(self) -> bytes:
        data, self.held = self.held, None
        assert data is not None
        if self._release_timer is not None:
            self._release_timer.cancel()
        return data

    def _give_up_waiting(self) -> None:
        if self.held is not None:
            self.put(self.release(), 0.0)


def _is_on(fault: Fault, direction: Direction) -> bool:
    return fault.direction in ("both", direction)


def _end(writer: asyncio.StreamWriter, *, is_fin: bool) -> None:
    with suppress(OSError):
        if is_fin:
            writer.close()
            return
        sock = writer.get_extra_info("socket")
        if sock is not None:  # what makes the end a reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@asynccontextmanager
async def fault_proxy(kind: str = "bytes", target: tuple[str, int] = ("", 0)) -> AsyncIterator[FaultProxy]:
    """One proxy with a board of its own. Its link is called ``client>server:KIND``."""
    proxy = FaultProxy(FaultBoard(), "server", kind, target)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()


@contextmanager
def fault_on(board: FaultBoard, pattern: str, **what: object) -> Iterator[Fault]:
    """A fault for the time of a block."""
    fault = board.set(pattern, Fault(**what))  # type: ignore[arg-type]
    try:
        yield fault
    finally:
        board.clear(pattern)
