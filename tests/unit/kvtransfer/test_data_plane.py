"""What a sender may do on the data plane, and that nothing else gets a byte into the pool."""

from __future__ import annotations

import asyncio
import random
import struct
import threading
from collections.abc import Sequence

import pytest
from helpers import kv_names as kv
from helpers.kv_agents import Node, Prompt, hand_over, running
from helpers.kv_raw_peer import BLOCK, Connection, RawPeer, blocks_frame, checksum, raw_peer
from helpers.waiting import eventually

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.transport.frames import BlockEntry, FrameKind

NAMES = kv.names(3)


def data_for(*indices: int) -> dict[int, bytes]:
    return {index: random.Random(index).randbytes(BLOCK) for index in indices}


async def prepared(peer: RawPeer) -> tuple[m.HandoffId, m.Grant, Connection]:
    await peer.shake_hands()
    handoff = peer.handoff()
    return handoff, await peer.reserve(handoff, NAMES), await peer.connect()


async def still_serves(node: Node) -> None:
    """A normal handoff right after works."""
    node.host.refuse = None
    async with running("prefill-1") as sender:
        sender.fill(3)
        await hand_over(sender, node, Prompt([1, 2], request_id="after"))


async def test_by_the_book_it_works_frame_by_frame() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        data = data_for(0, 1, 2)
        await connection.send(blocks_frame(handoff, grant, {2: data[2]}))
        await connection.send(blocks_frame(handoff, grant, {0: data[0], 1: data[1]}))
        for expected in ((2,), (0, 1)):
            frame = await connection.next_frame()
            assert frame is not None
            assert (frame[0], frame[1], frames.parse_verdicts(frame[2])[0]) == (
                FrameKind.VERDICTS,
                handoff.digest,
                expected,
            )
        assert await peer.commit(handoff, data, NAMES) == m.Ack(handoff)
        for slot in grant.slots:
            assert node.block(slot.block_id) == data[slot.index]


async def test_frames_cut_into_any_pieces_are_the_same_frames() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        data = data_for(0, 1, 2)
        stream = blocks_frame(handoff, grant, {0: data[0]}) + blocks_frame(handoff, grant, {1: data[1], 2: data[2]})
        rng = random.Random(5)
        while stream:
            size = rng.choice([1, 7, 63, 64, 65, 1000, 5000])
            await connection.send(stream[:size])
            stream = stream[size:]
            await asyncio.sleep(0)
        assert await peer.commit(handoff, data, NAMES) == m.Ack(handoff)


def spoiled_header(handoff: m.HandoffId, grant: m.Grant, offset: int, value: bytes) -> bytes:
    frame = bytearray(blocks_frame(handoff, grant, data_for(0)))
    frame[offset : offset + len(value)] = value
    return bytes(frame)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(0, b"EVIL", id="magic"),
        pytest.param(4, struct.pack("<H", 0), id="version 0"),
        pytest.param(4, struct.pack("<H", 99), id="version 99"),
        pytest.param(6, b"\7", id="unknown kind"),
        pytest.param(6, bytes([FrameKind.BLOCK_REFS]), id="kind of another transport"),
        pytest.param(6, bytes([FrameKind.HELLO]), id="second hello"),
        pytest.param(8, struct.pack("<H", 0), id="no entries"),
        pytest.param(8, struct.pack("<H", 999), id="too many entries"),
        pytest.param(12, struct.pack("<I", 2**32 - 1), id="body of 4 GiB"),
        pytest.param(32, bytes(32), id="another transfer token"),
        pytest.param(92, struct.pack("<I", 2**31), id="block of 2 GiB"),
        pytest.param(92, struct.pack("<I", BLOCK - 1), id="block one byte short"),
    ],
)
async def test_a_frame_that_no_peer_sends_ends_the_connection_and_writes_nothing(offset: int, value: bytes) -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        before = node.contents()
        await connection.send(spoiled_header(handoff, grant, offset, value))
        assert (await connection.until_closed())[-1] is FrameKind.CLOSE
        assert node.contents() == before
        await still_serves(node)


OUTSIDE = [
    pytest.param({"block_id": 31}, id="another block"),
    pytest.param({"block_id": 2**32 - 1}, id="block id out of range"),
    pytest.param({"generation": 9}, id="another generation"),
    pytest.param({"index": 3}, id="index out of range"),
    pytest.param({"index": 2**32 - 1}, id="huge index"),
]


@pytest.mark.parametrize("changes", OUTSIDE)
async def test_a_write_outside_the_grant_is_refused_before_a_byte_lands_and_revokes_it(changes: dict[str, int]) -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        before = node.contents()
        await connection.send(blocks_frame(handoff, grant, data_for(0), **changes))
        frame = await connection.next_frame()
        assert frame is not None
        assert frame[0] is FrameKind.GONE
        assert frames.parse_text(frame[2])[0] is TransferCode.NOT_GRANTED
        assert node.host.releases == [(handoff.key, TransferCode.NOT_GRANTED, True)]
        assert node.contents() == before
        answer = await peer.commit(handoff, {}, NAMES)
        assert isinstance(answer, m.Refuse)
        await still_serves(node)


async def test_the_same_slot_twice_in_a_frame_is_refused() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        before = node.contents()
        (block,) = data_for(0).values()
        entries = [BlockEntry(grant.slots[0], checksum(block), 0)] * 2
        frame = frames.pack_blocks(FrameKind.BLOCKS, handoff.digest, grant.token, entries, BLOCK)
        await connection.send(frame + block + block)
        await eventually(lambda: node.host.releases == [(handoff.key, TransferCode.NOT_GRANTED, True)])
        assert node.contents() == before


async def test_a_corrupt_block_is_told_and_can_be_sent_again() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        data = data_for(0, 1, 2)
        spoiled = bytearray(blocks_frame(handoff, grant, data))
        spoiled[-1] ^= 1
        await connection.send(bytes(spoiled))
        frame = await connection.next_frame()
        assert frame is not None
        assert frames.parse_verdicts(frame[2]) == ((0, 1), (2,))
        assert node.agent.stats().corrupt_blocks == 1
        await connection.send(blocks_frame(handoff, grant, {2: data[2]}))
        assert await peer.commit(handoff, data, NAMES) == m.Ack(handoff)


async def test_a_commit_with_blocks_missing_names_them() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        data = data_for(0, 1, 2)
        await connection.send(blocks_frame(handoff, grant, {1: data[1]}))
        assert await peer.commit(handoff, data, NAMES) == m.Incomplete(handoff, 1, (0, 2))
        await connection.send(blocks_frame(handoff, grant, {0: data[0], 2: data[2]}))
        assert await peer.commit(handoff, data, NAMES) == m.Ack(handoff)


async def test_a_commit_of_other_blocks_than_arrived_is_refused() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        await connection.send(blocks_frame(handoff, grant, data_for(0, 1, 2)))
        answer = await peer.commit(handoff, {**data_for(0, 1), 2: bytes(BLOCK)}, NAMES)
        assert isinstance(answer, m.Refuse)
        assert answer.code is TransferCode.DIGEST_MISMATCH
        assert node.host.commits == {}


async def replayed(connection: Connection, node: Node, frame: bytes, num_fenced: int) -> None:
    """Sends a frame that must be dropped and counted, changing nothing."""
    before = node.contents()
    fenced = node.agent.stats().fenced
    await connection.send(frame)
    await eventually(lambda: node.agent.stats().fenced == fenced + num_fenced, what="the fenced frame")
    assert node.contents() == before


async def test_frames_after_an_abort_are_dropped() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        await peer.abort(handoff)
        await replayed(connection, node, blocks_frame(handoff, grant, data_for(0, 1)), 1)
        frame = await connection.next_frame()
        assert frame is not None
        assert (frame[0], frames.parse_text(frame[2])[0]) == (FrameKind.GONE, TransferCode.ABORTED)
        await replayed(connection, node, blocks_frame(handoff, grant, data_for(2)), 1)  # the connection lives on


async def test_a_whole_transfer_replayed_after_its_commit_is_dropped() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        data = data_for(0, 1, 2)
        await connection.send(blocks_frame(handoff, grant, data))
        await peer.commit(handoff, data, NAMES)
        spoiled = {index: bytes(BLOCK) for index in data}
        await replayed(connection, node, blocks_frame(handoff, grant, spoiled), 1)
        assert await peer.commit(handoff, data, NAMES) == m.Ack(handoff)  # the same answer as before


async def test_frames_of_an_unknown_handoff_are_dropped() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        _, grant, connection = await prepared(peer)
        await replayed(connection, node, blocks_frame(peer.handoff("other"), grant, data_for(0)), 1)
        await replayed(connection, node, blocks_frame(peer.handoff("raw", attempt=2), grant, data_for(0)), 1)


async def test_another_peers_grant_is_of_no_use() -> None:
    async with running("decode-0") as node, raw_peer(node) as victim, raw_peer(node, "prefill-thief") as thief:
        handoff, grant, _ = await prepared(victim)
        await thief.shake_hands()
        connection = await thief.connect()
        await replayed(connection, node, blocks_frame(handoff, grant, data_for(0)), 1)


# Writes that outlive their handoff.


class GatedMemory(HostBlockMemory):
    """Landing takes until the gate opens."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        super().__init__(num_blocks, block_bytes)
        self.is_staged = True  # so that store is called, on a thread
        self.landing = threading.Event()
        self.gate = threading.Event()

    def store(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        self.landing.set()
        assert self.gate.wait(10)


@pytest.mark.parametrize("ending", ["abort", "forget", "write outside the grant"])
@pytest.mark.parametrize("transport", ["tcp", "shm"])
async def test_slots_are_quarantined_while_a_write_can_still_land(transport: str, ending: str) -> None:
    memory = GatedMemory(16, BLOCK)
    async with running("decode-0", memory=memory) as node, raw_peer(node) as peer:
        source = HostBlockMemory(4, BLOCK)
        await peer.shake_hands(transport, Offer(host_id(), source.shared))
        handoff = peer.handoff()
        grant = await peer.reserve(handoff, NAMES)
        connection = await peer.connect()
        frame = blocks_frame(handoff, grant, {0: bytes(BLOCK)})
        if transport == "shm":
            entries = [BlockEntry(grant.slots[0], checksum(bytes(BLOCK)), 1)]
            frame = frames.pack_blocks(FrameKind.BLOCK_REFS, handoff.digest, grant.token, entries, BLOCK)
        await connection.send(frame)
        await eventually(memory.landing.is_set)
        if ending == "abort":
            await peer.abort(handoff)
        elif ending == "forget":
            node.agent.forget(handoff.key)
        else:
            bad = [BlockEntry(m.Slot(1, 0, 99), 0, 1)]
            kind = FrameKind.BLOCKS if transport == "tcp" else FrameKind.BLOCK_REFS
            bad_frame = frames.pack_blocks(kind, handoff.digest, grant.token, bad, BLOCK)
            await connection.send(bad_frame + (bytes(BLOCK) if transport == "tcp" else b""))
        await eventually(lambda: len(node.host.releases) == 1)
        code = TransferCode.NOT_GRANTED if ending == "write outside the grant" else TransferCode.ABORTED
        assert node.host.releases == [(handoff.key, code, False)]
        assert node.agent.stats().num_quarantined == 3
        memory.gate.set()
        await eventually(lambda: len(node.host.releases) == 2)
        assert node.host.releases[1] == (handoff.key, code, True)
        assert node.agent.stats().num_quarantined == 0
        source.close()


async def test_copies_that_have_not_begun_are_not_begun_after_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.kvtransfer.transport.shm._MAX_BATCHES", 1)
    memory = GatedMemory(16, BLOCK)
    async with running("decode-0", memory=memory) as node, raw_peer(node) as peer:
        source = HostBlockMemory(4, BLOCK)
        source.rows.row(1)[:] = data_for(1)[1]
        await peer.shake_hands("shm", Offer(host_id(), source.shared))
        handoff = peer.handoff()
        grant = await peer.reserve(handoff, NAMES)
        before = node.contents()
        connection = await peer.connect()
        for slot in grant.slots[:2]:
            entries = [BlockEntry(slot, source.rows.checksums((1,))[0], 1)]
            await connection.send(frames.pack_blocks(FrameKind.BLOCK_REFS, handoff.digest, grant.token, entries, BLOCK))
        await eventually(lambda: memory.landing.is_set() and node.agent._context.transports["shm"]._arrivals)  # type: ignore[attr-defined]
        await peer.abort(handoff)
        memory.gate.set()
        await eventually(lambda: (handoff.key, TransferCode.ABORTED, True) in node.host.releases)
        changed = {block_id for block_id, content in enumerate(node.contents()) if content != before[block_id]}
        assert changed == {grant.slots[0].block_id}
        source.close()


async def test_what_still_comes_in_after_an_abort_goes_nowhere() -> None:
    """Half a block is in its slot when the handoff is aborted: the other half must not follow it there."""
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        frame = blocks_frame(handoff, grant, data_for(0, 1))
        await connection.send(frame[: -BLOCK - BLOCK // 2])
        slot = next(slot for slot in grant.slots if slot.index == 0)
        await eventually(lambda: node.block(slot.block_id)[: BLOCK // 2] == data_for(0)[0][: BLOCK // 2])
        await peer.abort(handoff)
        await eventually(lambda: (handoff.key, TransferCode.ABORTED, True) in node.host.releases, what="quiet")
        before = node.contents()
        await connection.send(frame[-BLOCK - BLOCK // 2 :])
        await replayed(
            connection, node, blocks_frame(handoff, grant, data_for(2)), 1
        )  # and the stream is still in step
        assert node.contents() == before


# By reference.


async def test_a_reference_outside_the_shared_memory_revokes_the_grant() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        source = HostBlockMemory(4, BLOCK)
        await peer.shake_hands("shm", Offer(host_id(), source.shared))
        handoff = peer.handoff()
        grant = await peer.reserve(handoff, NAMES)
        before = node.contents()
        connection = await peer.connect()
        entries = [BlockEntry(grant.slots[0], 0, source.rows.num_rows)]
        await connection.send(frames.pack_blocks(FrameKind.BLOCK_REFS, handoff.digest, grant.token, entries, BLOCK))
        assert FrameKind.CLOSE in await connection.until_closed()
        await eventually(lambda: node.host.releases == [(handoff.key, TransferCode.PROTOCOL, True)])
        assert node.contents() == before
        source.close()


async def test_a_sender_that_reuses_a_block_too_early_is_caught() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        source = HostBlockMemory(4, BLOCK)
        source.rows.row(2)[:] = data_for(0)[0]
        announced = source.rows.checksums((2,))[0]
        await peer.shake_hands("shm", Offer(host_id(), source.shared))
        handoff = peer.handoff()
        grant = await peer.reserve(handoff, NAMES)
        connection = await peer.connect()
        source.rows.row(2)[:] = data_for(1)[1]  # somebody else's block by now
        entries = [BlockEntry(grant.slots[0], announced, 2)]
        await connection.send(frames.pack_blocks(FrameKind.BLOCK_REFS, handoff.digest, grant.token, entries, BLOCK))
        frame = await connection.next_frame()
        assert frame is not None
        assert frames.parse_verdicts(frame[2]) == ((), (grant.slots[0].index,))
        source.close()


# Anything at all.


async def test_mutated_frames_never_write_outside_the_grant_and_never_stop_the_worker() -> None:
    rng = random.Random(7)
    async with running("decode-0") as node, raw_peer(node) as peer:
        await peer.shake_hands()
        before = node.contents()
        touched: set[int] = set()
        connection: Connection | None = None
        for attempt in range(1, 301):
            handoff = peer.handoff("fuzz", attempt)
            grant = await peer.reserve(handoff, NAMES)
            touched |= {slot.block_id for slot in grant.slots}
            if connection is None:
                connection = await peer.connect()
            frame = bytearray(blocks_frame(handoff, grant, data_for(*rng.sample(range(3), rng.randint(1, 3)))))
            for _ in range(rng.randint(1, 3)):
                frame[rng.randrange(min(len(frame), 64 + 96))] = rng.choice([0, 1, 255, rng.randrange(256)])
            try:
                await connection.send(bytes(frame[: rng.choice([len(frame), len(frame), rng.randrange(len(frame))])]))
            except ConnectionError:
                connection = None
            if rng.random() < 0.3 and connection is not None:
                await connection.close()
                connection = None
            await peer.abort(handoff)
        for block_id, content in enumerate(node.contents()):
            assert block_id in touched or content == before[block_id]
        assert len(touched) < node.memory.num_blocks
        assert node.agent.stats().num_receiving == 0
        assert sorted(node.host.free) == list(range(node.memory.num_blocks))
        await still_serves(node)
