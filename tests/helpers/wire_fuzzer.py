"""Frames as a hostile or broken sender could send them, knowing the protocol: round after round against a live agent.

Each round reserves a few blocks and sends frames drawn from ``MOVES``: some by the book, most of them spoiled in one place.
The fuzzer keeps a model of what may have changed: a slot of the round's own grant, while the handoff is open. Everything
else in the pool must be byte for byte what it was, after every round.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import xxhash
from helpers.kv_agents import Node
from helpers.kv_raw_peer import BLOCK, Connection, RawPeer, blocks_frame

from baton.kvtransfer import messages as m
from baton.kvtransfer.identity import HandoffId
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.frames import BlockEntry, FrameKind

HEADER = frames.HEADER_BYTES
ENTRY = 32
MAX_BLOCKS = 6


class WireFuzzer:
    """``num_frames`` counts what was sent; ``moves`` by kind."""

    def __init__(self, node: Node, peer: RawPeer, seed: int) -> None:
        self.node = node
        self.peer = peer
        self.rng = random.Random(seed)
        self.moves: Counter[str] = Counter()
        self.num_commits = 0
        self._connection: Connection | None = None
        self._round = 0
        self._contents = node.contents()
        self._handoff: HandoffId
        self._grant: m.Grant
        self._names: list[bytes]
        self._data: dict[int, bytes] = {}
        self._old_frames: list[bytes] = []  # of handoffs that have ended
        self._is_revoked = False
        self._landed: set[int] = set()
        self._was_cut = False  # with a connection that we close, what the receiver has not read yet is gone

    @property
    def num_frames(self) -> int:
        return self.moves.total()

    async def run_round(self) -> None:
        """One handoff, from the reservation to its end, and the check of the whole pool after it."""
        await self._open()
        for _ in range(self.rng.randint(2, 12)):
            if self._is_revoked:
                break
            await self._move()
        await self._end()
        await self._move_late()
        self._check_pool()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def _open(self) -> None:
        self._round += 1
        rng = self.rng
        self._handoff = self.peer.handoff(f"fuzz-{self._round % 7}", self._round)
        self._names = [rng.randbytes(16) for _ in range(rng.randint(1, MAX_BLOCKS))]
        self._grant = await self.peer.reserve(self._handoff, self._names)
        self._data = {index: rng.randbytes(BLOCK) for index in range(len(self._names))}
        self._is_revoked = False
        self._landed, self._was_cut = set(), False

    async def _move(self) -> None:
        name = self.rng.choice(sorted(MOVES))
        frame, ending = MOVES[name](self)
        self.moves[name] += 1
        await self._send(frame, ending)

    async def _send(self, frame: bytes, ending: str) -> None:
        """``ending``: what the receiver does: ``""`` nothing, ``close`` the connection, ``revoke`` the grant, ``cut`` is us."""
        for _ in range(2):  # a connection that the receiver closed after the last frame is only noticed now
            if self._connection is None:
                self._connection = await self.peer.connect()
            try:
                await self._connection.send(frame)
                break
            except ConnectionError:
                self._was_cut = True
                await self._drop()
        assert self._connection is not None
        if ending.startswith("close"):
            kinds = await self._connection.until_closed()
            assert kinds, "the receiver closed without a word"
            assert kinds[-1] is FrameKind.CLOSE
            await self._drop()
            self._is_revoked = ending == "close and revoke"
        elif ending == "cut":
            self._was_cut = True
            await self._drop()
        elif ending == "revoke":
            await self._until_gone()
            self._is_revoked = True

    async def _until_gone(self) -> None:
        assert self._connection is not None
        while (frame := await self._connection.next_frame()) is not None:
            if frame[0] is FrameKind.GONE and frame[1] == self._handoff.digest:
                return
        raise AssertionError("the connection ended before the handoff was said to be gone")

    async def _drop(self) -> None:
        assert self._connection is not None
        await self._connection.close()
        self._connection = None

    async def _end(self) -> None:
        """Commits what was sent by the book, or gives up. A commit of blocks that did not land must not be acknowledged."""
        rng = self.rng
        if not self._is_revoked and rng.random() < 0.5:
            if rng.random() < 0.7:
                missing = {index: data for index, data in self._data.items() if index not in self._landed}
                if missing:
                    await self._send(blocks_frame(self._handoff, self._grant, missing), "")
                    self._landed |= missing.keys()
            answer = await self.peer.commit(self._handoff, self._data, self._names)
            is_whole = self._landed == self._data.keys()
            if is_whole and self._was_cut and isinstance(answer, m.Incomplete):
                lost = {index: self._data[index] for index in answer.missing}
                await self._send(blocks_frame(self._handoff, self._grant, lost), "")
                answer = await self.peer.commit(self._handoff, self._data, self._names, answer.round + 1)
            assert isinstance(answer, m.Ack if is_whole else m.Incomplete | m.Refuse), (answer, is_whole)
            if is_whole:
                self.num_commits += 1
                self._note_committed()
        self._old_frames = [blocks_frame(self._handoff, self._grant, self._data), *self._old_frames[:20]]
        await self.peer.abort(self._handoff)

    def _note_committed(self) -> None:
        for slot in self._grant.slots:
            assert self.node.block(slot.block_id) == self._data[slot.index]
        self._contents = self.node.contents()
        # What a worker would do when the request ends: the blocks are reused.
        self.node.host.free += [slot.block_id for slot in self.node.host.slots.pop(self._handoff.key)]
        self.node.host.commits.clear()

    async def _move_late(self) -> None:
        """Frames of a handoff that has ended: nothing lands, nothing ends."""
        if self._connection is not None and self.rng.random() < 0.5:
            self.moves["late"] += 1
            await self._send(self._old_frames[0], "")

    def _check_pool(self) -> None:
        own = {slot.block_id for slot in self._grant.slots}
        for block_id, before in enumerate(self._contents):
            now = self.node.block(block_id)
            assert block_id in own or now == before, f"block {block_id} changed, which nobody had granted"
            self._contents[block_id] = now

    # What the moves are made of.

    def some(self) -> dict[int, bytes]:
        """Some of the blocks, by the book."""
        indices = self.rng.sample(sorted(self._data), self.rng.randint(1, len(self._data)))
        return {index: self._data[index] for index in indices}

    def frame(self, **slot_changes: int) -> bytes:
        return blocks_frame(self._handoff, self._grant, self.some(), **slot_changes)

    def by_the_book(self) -> bytes:
        blocks = self.some()
        self._landed |= blocks.keys()
        return blocks_frame(self._handoff, self._grant, blocks)

    def corrupt(self) -> bytes:
        """Other bytes than the checksum says: never landed by it, though perhaps before."""
        index = self.rng.choice(sorted(self._data))
        slot = next(slot for slot in self._grant.slots if slot.index == index)
        data = bytearray(self._data[index])
        data[self.rng.randrange(BLOCK)] ^= 1 << self.rng.randrange(8)
        entry = BlockEntry(slot, xxhash.xxh3_64_intdigest(self._data[index]), 0)
        head = frames.pack_blocks(FrameKind.BLOCKS, self._handoff.digest, self._grant.token, [entry], BLOCK)
        return head + bytes(data)

    def twice(self) -> bytes:
        index = self.rng.choice(sorted(self._data))
        slot = next(slot for slot in self._grant.slots if slot.index == index)
        entry = BlockEntry(slot, xxhash.xxh3_64_intdigest(self._data[index]), 0)
        head = frames.pack_blocks(FrameKind.BLOCKS, self._handoff.digest, self._grant.token, [entry, entry], BLOCK)
        return head + 2 * self._data[index]

    def with_header(self, offset: int, value: bytes) -> bytes:
        frame = self.frame()
        return frame[:offset] + value + frame[offset + len(value) :]

    def with_sizes(self) -> bytes:
        return self.with_header(HEADER + ENTRY - 4, struct.pack("<I", self.rng.choice(ODD_U32)))

    def of_another(self) -> bytes:
        """Good in itself, under a fence that nobody knows or that has ended."""
        if self._old_frames and self.rng.random() < 0.7:
            return self.rng.choice(self._old_frames)
        stranger = replace(self._handoff, key=replace(self._handoff.key, attempt=self._handoff.key.attempt + 10**6))
        return blocks_frame(stranger, self._grant, self.some())

    def noise(self) -> bytes:
        """Random bytes that do not begin like a frame."""
        return b"\0" + self.rng.randbytes(self.rng.randint(HEADER, 3 * HEADER))

    def truncated(self) -> bytes:
        frame = self.frame()
        return frame[: self.rng.randrange(1, len(frame))]

    def text(self, kind: FrameKind) -> bytes:
        return frames.pack_text(kind, self._handoff.digest, "aborted", "x" * self.rng.randrange(900))

    def odd(self, choices: list[int], code: str) -> bytes:
        return struct.pack(code, self.rng.choice(choices))


ODD_U16 = [0, 65, 255, 256, 65535]
ODD_U32 = [0, 1, BLOCK - 1, BLOCK + 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]

MOVES: dict[str, Callable[[WireFuzzer], tuple[bytes, str]]] = {
    "by the book": lambda f: (f.by_the_book(), ""),
    "corrupt": lambda f: (f.corrupt(), ""),
    "unknown or ended handoff": lambda f: (f.of_another(), ""),
    "truncated": lambda f: (f.truncated(), "cut"),
    "noise": lambda f: (f.noise(), "close"),
    "magic": lambda f: (f.with_header(0, f.rng.randbytes(3) + b"\0"), "close"),
    "version": lambda f: (f.with_header(4, f.odd([0, 99, 65535], "<H")), "close"),
    "kind": lambda f: (f.with_header(6, bytes([f.rng.choice([0, 3, 7, 99, 255])])), "close"),
    "reserved": lambda f: (f.with_header(f.rng.choice([7, 10, 11]), b"\1"), "close"),
    "count": lambda f: (f.with_header(8, f.odd(ODD_U16, "<H")), "close"),
    "body bytes": lambda f: (f.with_header(12, f.odd([0, 1, 31, 2**16, 2**31, 2**32 - 1], "<I")), "close"),
    "token": lambda f: (f.with_header(32, f.rng.randbytes(32)), "close"),
    "block bytes": lambda f: (f.with_sizes(), "close and revoke"),
    "hello again": lambda f: (frames.pack_hello(f.rng.randbytes(16), f.rng.randbytes(32)), "close"),
    "verdicts": lambda f: (frames.pack_verdicts(f.rng.randbytes(16), [0], [1]), "close"),
    "gone": lambda f: (f.text(FrameKind.GONE), "close"),
    "close": lambda f: (f.text(FrameKind.CLOSE), "close"),
    "another block": lambda f: (f.frame(block_id=f.rng.choice([2**31, 2**32 - 1, 31 + f.rng.randrange(9)])), "revoke"),
    "another generation": lambda f: (f.frame(generation=f.rng.choice([0, 2**63, 2**64 - 1])), "revoke"),
    "another index": lambda f: (f.frame(index=f.rng.choice([MAX_BLOCKS, 2**31, 2**32 - 1])), "revoke"),
    "twice in a frame": lambda f: (f.twice(), "revoke"),
}
"""How each frame is made, and what must come of it."""
