"""A canary: a block of a known pattern that goes ahead of a pair's first handoff, by the way that the handoffs will take.

It is announced in the frames of any block, with the pair's fence and token in place of a handoff's, and lands in a row that no
block of the pool ever uses. The receiver checks its own copy against the announced checksum and against the pattern, and
answers with verdicts. So a pair that made a handshake over memory it cannot read, or a link that spoils bytes, is found out
before anybody's KV is at stake. The pattern is one per sender process: a mapping of an earlier process does not pass.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import deque
from dataclasses import dataclass, replace

from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.errors import RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.memory import NUM_CANARY_BLOCKS, BlockMemory
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.transport.base import Arrival, Landed
from baton.kvtransfer.transport.frames import Blocks, Header
from baton.kvtransfer.transport.listener import IncomingPair, Inlet
from baton.kvtransfer.transport.outlet import BlockPush, Outlet
from baton.kvtransfer.transport.stream import Payload

# Frames of canaries that one sender may have waiting here: it sends one and waits for the verdict.
_MAX_WAITING = 8
# The memory's canary block that canaries are sent from; each transport's land in one of the others.
_OUT = 0
# Blocks in the second go, which measures bandwidth.
_MAX_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class LinkReport:
    """How blocks get from this worker to one receiver, as the canary found it."""

    transport: str
    is_verified: bool = True  # False: the receiver is of a version that knows no canaries
    rtt_ms: float = 0.0  # one block there, and the verdict on it back
    gb_per_s: float = 0.0  # several blocks in one go; 0 where that was not measured
    failed: tuple[
        str, ...
    ] = ()  # transports that were tried before this one, each with the reason why it does not work


class CanaryFailed(TransferError):
    """The canary did not arrive as it was sent: this transport does not work between these two."""

    def __init__(self, message: str) -> None:
        super().__init__(TransferCode.CHECKSUM, message)


def pattern(nonce: int, num_bytes: int) -> bytes:
    """What a canary looks like. No two pages of it are equal, so that blocks of one that were mixed up do not pass either."""
    return hashlib.shake_128(b"baton canary" + nonce.to_bytes(8, "little")).digest(num_bytes)


def nonce_of(sender: WorkerIdentity) -> int:
    """One per process."""
    digest = hashlib.blake2b(f"{sender.worker_id}/{sender.incarnation}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class CanarySender:
    """Sends canaries to one receiver and waits for the verdicts. Several may be on the way, each with indices of its own."""

    def __init__(self, context: AgentContext, pair_fence: bytes) -> None:
        self.fence = pair_fence
        self._context = context
        self._next_index = 0
        self._watches: set[_Watch] = set()

    async def measure(self, outlet: Outlet, transport: str, token: bytes) -> LinkReport:
        """One block, then several in one go. Raises CanaryFailed, or the error that ended the connection."""
        memory, limit = self._context.memory, self._context.options.canary_bytes
        one_s = await self._send(outlet, token, 1)
        if one_s is None:
            return LinkReport(transport, is_verified=False)
        count = min(_MAX_BLOCKS, memory.max_rows, limit // memory.block_bytes)
        several_s = await self._send(outlet, token, count) if count > 1 else None
        num_bytes, seconds = (count * memory.block_bytes, several_s) if several_s else (memory.block_bytes, one_s)
        return LinkReport(transport, True, one_s * 1e3, num_bytes / max(seconds, 1e-9) / 1e9)

    async def _send(self, outlet: Outlet, token: bytes, count: int) -> float | None:
        """Seconds until all verdicts were there; None when the receiver knows no canaries."""
        memory, nonce = self._context.memory, nonce_of(self._context.identity)
        memory.rows.row(memory.canary_row(_OUT))[:] = pattern(nonce, memory.block_bytes)
        loop = asyncio.get_running_loop()
        indices = [(self._next_index + number) % 2**32 for number in range(count)]
        self._next_index = (self._next_index + count) % 2**32
        watch = _Watch(set(indices), loop.create_future())
        self._watches.add(watch)
        started_s = loop.time()
        block_id = memory.num_blocks + _OUT
        outlet.push(self.fence, token, [BlockPush(Slot(index, 0, nonce), block_id) for index in indices])
        timeout_s = self._context.options.canary_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return loop.time() - started_s if await watch.heard else None
        except TimeoutError:
            raise CanaryFailed(f"no verdict on the canary within {timeout_s:g} s") from None
        finally:
            self._watches.discard(watch)

    # What is heard of it.

    def on_verdicts(self, landed: tuple[int, ...], corrupt: tuple[int, ...]) -> None:
        for watch in list(self._watches):
            if not watch.missing.isdisjoint(corrupt):
                watch.fail(CanaryFailed("the canary arrived corrupt"))
            watch.missing.difference_update(landed)
            if not watch.missing:
                watch.answer(True)

    def on_gone(self, code: TransferCode, reason: str) -> None:
        if code is not TransferCode.UNKNOWN_HANDOFF:
            self.on_lost(code, reason)
            return
        for watch in self._watches:  # what a receiver says of any fence that it does not know
            watch.answer(False)

    def on_lost(self, code: TransferCode, reason: str) -> None:
        """The connection is gone: no verdict will come."""
        error = CanaryFailed(reason) if code is TransferCode.PEER_LOST else TransferError(code, reason)
        for watch in self._watches:
            watch.fail(error)


@dataclass(slots=True, eq=False)
class _Watch:
    """Waits for the verdicts on one canary."""

    missing: set[int]
    heard: asyncio.Future[bool]  # False: the receiver knows no canaries

    def answer(self, is_known: bool) -> None:
        if not self.heard.done():
            self.heard.set_result(is_known)

    def fail(self, error: TransferError) -> None:
        if not self.heard.done():
            self.heard.set_exception(error)


class CanaryReceiver:
    """Lets canaries land, one frame after the other for each transport: they all land in one row, which it alone uses.

    A landing that never ends holds up nobody but those who come by the same transport.
    """

    def __init__(self, context: AgentContext) -> None:
        self._context = context
        self._waiting: deque[_Landing] = deque()
        self._landing: dict[str, _Landing] = {}  # by transport
        self._numbers = {name: 1 + place for place, name in enumerate(context.transports)}
        assert len(self._numbers) < NUM_CANARY_BLOCKS
        self._tasks: set[asyncio.Task[None]] = set()

    def push(self, inlet: Inlet, pair: IncomingPair, header: Header, blocks: Blocks) -> Payload | None:
        """A canary was announced. Raises RemoteProtocolError for one without the pair's token, or too many at once."""
        if not hmac.compare_digest(header.token, pair.token):
            raise RemoteProtocolError("a canary with another token than the pair's", TransferCode.STALE)
        if sum(landing.pair is pair for landing in self._waiting) >= _MAX_WAITING:
            raise RemoteProtocolError("more canaries than one sender may have waiting")
        landing = _Landing(self, inlet, pair, blocks, len(blocks) * self._context.memory.block_bytes)
        self._waiting.append(landing)
        self._start_next()
        return landing if pair.transport.is_inline else None

    def drop(self, landing: _Landing) -> None:
        """Its connection is gone before it began."""
        if landing in self._waiting:
            self._waiting.remove(landing)

    def _start_next(self) -> None:
        for landing in list(self._waiting):
            name = landing.pair.transport.name
            if landing.pair.is_closed:
                self._waiting.remove(landing)
            elif name not in self._landing:
                self._waiting.remove(landing)
                self._landing[name] = landing
                landing.start(self._context.memory, self._numbers[name])

    def ended(self, landing: _Landing) -> None:
        """All of it is here, or will not come."""
        task = asyncio.create_task(self._judge(landing), name="kv-canary")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _judge(self, landing: _Landing) -> None:
        try:
            nonces = set(landing.blocks.generations)
            is_right = len(nonces) == 1 and not landing.spoiled
            if is_right:
                loop, name = asyncio.get_running_loop(), landing.pair.transport.name
                is_right = await loop.run_in_executor(self._context.executor, self._shows, name, nonces.pop())
            good = landing.landed if is_right else []
            bad = [index for index in landing.blocks.indices if index not in good]
            landing.inlet.send_verdicts(landing.pair.fence, tuple(good), tuple(bad))
        finally:
            del self._landing[landing.pair.transport.name]
            self._start_next()

    def count_corrupt(self, num_blocks: int) -> None:
        """So many blocks of a canary came with a wrong checksum."""
        self._context.stats.corrupt_blocks += num_blocks

    def _shows(self, transport: str, nonce: int) -> bool:
        memory = self._context.memory
        return memory.rows.row(memory.canary_row(self._numbers[transport])) == pattern(nonce, memory.block_bytes)

    async def close(self) -> None:
        """Returns when none is landing or being looked at."""
        self._waiting.clear()
        while self._tasks:
            await asyncio.wait(self._tasks)


@dataclass(eq=False)
class _Landing:
    """The blocks of one frame of a canary. Reads what follows the frame, where anything does."""

    receiver: CanaryReceiver
    inlet: Inlet
    pair: IncomingPair
    blocks: Blocks
    num_left: int
    inner: Payload | None = None

    def __post_init__(self) -> None:
        self.landed: list[int] = []
        self.spoiled: list[int] = []

    def start(self, memory: BlockMemory, number: int) -> None:
        """Lands in the memory's canary block of this number."""
        memory.rows.row(memory.canary_row(number))[:] = bytes(memory.block_bytes)
        here = replace(self.blocks, block_ids=(memory.num_blocks + number,) * len(self.blocks))
        allowed = set(here.indices)
        arrival = Arrival(self.pair.fence, here, allowed, self.pair.source, self.inlet.resume, self._on_ended)
        self.inner = self.pair.transport.land(arrival)
        self.inlet.resume()

    def _on_ended(self, part: Landed) -> None:
        self.landed += [index for index, _ in part.landed]
        self.spoiled += [*part.corrupt, *part.broken]
        self.receiver.count_corrupt(len(part.corrupt))
        if len(self.landed) + len(self.spoiled) >= len(set(self.blocks.indices)):
            self.receiver.ended(self)

    # As the payload of its frame.

    def buffers(self, max_bytes: int, max_buffers: int) -> list[memoryview]:
        return [] if self.inner is None else self.inner.buffers(max_bytes, max_buffers)

    def advance(self, num_bytes: int) -> None:
        assert self.inner is not None
        self.num_left -= num_bytes
        self.inner.advance(num_bytes)

    def cut(self) -> None:
        if self.inner is None:
            self.receiver.drop(self)
        else:
            self.inner.cut()
