"""Connections of the data plane: who may have one, and for how long."""

from __future__ import annotations

import random

import pytest
from helpers import kv_names as kv
from helpers.kv_agents import Node, Prompt, hand_over, options, running
from helpers.kv_raw_peer import BLOCK, Connection, RawPeer, blocks_frame, raw_peer
from helpers.waiting import eventually

from baton.kvtransfer import messages as m
from baton.kvtransfer.identity import pair_digest
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.frames import FrameKind

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


async def test_a_connection_that_says_nothing_is_closed_soon() -> None:
    async with running("decode-0", options=options(hello_timeout_s=0.1)) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        connection = await peer.connect(hello=b"")
        assert await connection.until_closed() == [FrameKind.CLOSE]


async def test_a_connection_that_begins_to_say_something_is_closed_as_soon() -> None:
    async with running("decode-0", options=options(hello_timeout_s=0.1)) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        connection = await peer.connect(hello=frames.pack_hello(bytes(16), bytes(32))[:40])
        assert await connection.until_closed() == [FrameKind.CLOSE]


@pytest.mark.parametrize("what", ["token", "pair", "blocks first"])
async def test_a_connection_that_cannot_prove_who_it_is_is_closed(what: str) -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff, grant, _ = await prepared(peer)
        before = node.contents()
        fence = pair_digest(peer.identity, node.identity)
        connection = await peer.connect(
            hello={
                "token": frames.pack_hello(fence, bytes(32)),
                "pair": frames.pack_hello(bytes(16), peer.reply.data_token),
                "blocks first": blocks_frame(handoff, grant, data_for(0)),
            }[what]
        )
        assert await connection.until_closed() == [FrameKind.CLOSE]
        assert node.contents() == before


async def test_unknown_connections_are_capped_and_known_ones_are_not_kept_out_for_long() -> None:
    limits = options(max_unknown_connections=5, hello_timeout_s=0.3)
    async with running("decode-0", options=limits) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        for _ in range(5):
            await peer.connect(hello=b"")
        listener = node.agent._listener
        assert listener is not None
        await eventually(lambda: len(listener.inlets) == 5)
        for _ in range(20):
            assert await (await peer.connect(hello=b"")).until_closed() == []  # closed at once, without a word
        assert len(listener.inlets) <= 5
        await eventually(lambda: not listener.inlets)
        await still_serves(node)


async def test_a_connection_that_stops_in_the_middle_of_a_frame_is_closed_and_the_block_is_not_there() -> None:
    async with running("decode-0", options=options(stall_s=0.2)) as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        await connection.send(blocks_frame(handoff, grant, data_for(0))[:-1])
        assert await connection.until_closed() == []
        answer = await peer.commit(handoff, data_for(0), NAMES)
        assert answer == m.Incomplete(handoff, 1, (0, 1, 2))


async def test_an_idle_connection_is_not_closed() -> None:
    async with running("decode-0", options=options(stall_s=0.05)) as node, raw_peer(node) as peer:
        handoff, grant, connection = await prepared(peer)
        assert isinstance(await peer.commit(handoff, {}, NAMES), m.Incomplete)  # lasts longer than a stall
        await connection.send(blocks_frame(handoff, grant, data_for(0)))
        assert await connection.next_frame() is not None
