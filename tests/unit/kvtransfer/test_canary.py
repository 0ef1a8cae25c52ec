"""The block that goes ahead of a pair's first handoff, and what happens when it does not arrive as it was sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from helpers import kv_agents
from helpers.kv_agents import (
    LAYOUT,
    TRANSPORTS,
    Host,
    Node,
    Prompt,
    assert_arrived,
    failure_of,
    hand_over,
    open_handoff,
    options,
    running,
)
from helpers.kv_raw_peer import checksum, raw_peer
from helpers.waiting import eventually

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.api.kvtransfer.v1 import kvtransfer_pb2_grpc as pb_grpc
from baton.kvtransfer import wire
from baton.kvtransfer.canary import LinkReport, nonce_of, pattern
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.layout import Compatibility
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.outgoing_pair import OutgoingPair
from baton.kvtransfer.service import open_local_channel
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.base import Arrival, Offer, Transport
from baton.kvtransfer.transport.frames import BlockEntry, FrameKind

pytestmark = pytest.mark.usefixtures("where_bytes_are_moved")

CANARIES: dict[str, Any] = {"canary_bytes": 8 * LAYOUT.block_bytes, "canary_timeout_s": 30.0}


def canaries(**changes: Any) -> TransferOptions:
    return options(**{**CANARIES, **changes})


@asynccontextmanager
async def two(transports: Any = "auto", **changes: Any) -> AsyncIterator[tuple[Node, Node]]:
    async with kv_agents.two_nodes(transports, options=canaries(**changes)) as nodes:
        yield nodes


def transport(node: Node, name: str) -> Transport:
    return node.agent._context.transports[name]


def spoil(node: Node, name: str, when: Callable[[], bool] = lambda: True) -> list[int]:
    """What lands at ``node`` by this transport has one bit flipped in it. Returns the block ids that were spoilt."""
    landing, spoilt = transport(node, name), list[int]()
    rows = node.memory.rows
    copy_from, land = rows.copy_from, landing.land
    is_ours = False

    def spoiling_land(arrival: Any) -> Any:
        nonlocal is_ours
        is_ours = True
        return land(arrival)

    def spoiling_copy(source: Any, pairs: Any) -> list[int]:
        checksums = copy_from(source, pairs)
        if not (is_ours and when()):
            return checksums
        for source_row, row in pairs:
            spoilt.append(row)
            rows.row(row)[7] = source.row(source_row)[7] ^ 1
        return rows.checksums([row for _, row in pairs])

    landing.land = spoiling_land  # type: ignore[method-assign]
    rows.copy_from = spoiling_copy  # type: ignore[method-assign]
    return spoilt


async def probe(sender: Node, receiver: Node) -> LinkReport:
    return await sender.agent.probe(receiver.identity, receiver.address)


def link_between(sender: Node, receiver: Node) -> Any:
    return sender.agent._sending._pairs._pairs[receiver.identity].result()


@pytest.mark.parametrize("name", TRANSPORTS)
async def test_a_canary_comes_through_and_is_measured(name: str) -> None:
    async with two(name) as (sender, receiver):
        before = receiver.contents()
        for _ in range(2):  # the first makes the pair, the second measures it again
            report = await probe(sender, receiver)
            assert (report.transport, report.is_verified, report.failed) == (name, True, ())
            assert report.rtt_ms > 0
            assert report.gb_per_s > 0
        landed = receiver.memory.rows.row(receiver.memory.canary_row(1))
        assert landed == pattern(nonce_of(sender.identity), LAYOUT.block_bytes)
        assert receiver.contents() == before  # no block of the pool was touched
        assert not receiver.agent.stats().bytes_received
        assert not sender.agent.stats().bytes_sent
        await hand_over(sender, receiver, Prompt([1, 2]))


async def test_the_pattern_of_a_process_is_nobody_elses_and_no_page_of_it_is_like_another() -> None:
    async with running("prefill-0") as one, running("prefill-0", incarnation="2" * 32) as two:
        assert nonce_of(one.identity) != nonce_of(two.identity)
    pages = pattern(1, 64 * 4096)
    assert len({pages[start : start + 4096] for start in range(0, len(pages), 4096)}) == 64
    assert pages != pattern(2, 64 * 4096)


async def test_canaries_of_several_senders_land_one_after_the_other() -> None:
    async with (
        running("decode-0", options=canaries()) as receiver,
        running("prefill-0", options=canaries(), transports="tcp") as one,
        running("prefill-1", options=canaries(), transports="tcp") as two,
        running("prefill-2", options=canaries(), transports="shm") as three,
        running("prefill-3", options=canaries(), transports="inproc") as four,
    ):
        for _ in range(5):
            reports = await asyncio.gather(*(probe(sender, receiver) for sender in (one, two, three, four)))
            assert all(report.is_verified for report in reports)


async def test_auto_leaves_a_transport_that_spoils_the_canary_and_says_why() -> None:
    async with two(("shm", "tcp")) as (sender, receiver):
        spoilt = spoil(receiver, "shm", when=lambda: True)
        report = await probe(sender, receiver)
        assert spoilt
        assert (report.transport, report.failed) == ("tcp", ("shm: the canary arrived corrupt",))
        handed = await hand_over(sender, receiver, Prompt([1, 2, 3]))
        assert handed.transport == "tcp"
        assert handed.fallbacks == ()  # it was found out before this handoff began


async def test_without_another_transport_the_pair_is_not_made_and_the_next_try_is_a_new_one() -> None:
    async with two("shm") as (sender, receiver):
        is_bad = True
        spoil(receiver, "shm", when=lambda: is_bad)
        error = await failure_of(sender, receiver, Prompt([1]))
        assert (error.code, error.retryable) == (TransferCode.PEER_LOST, True)
        assert "works: shm: the canary arrived corrupt" in error.message
        assert receiver.host.slots == {}
        is_bad = False
        await hand_over(sender, receiver, Prompt([1], request_id="later"))


async def test_a_canary_that_nobody_answers_is_given_up() -> None:
    async with two(("shm", "tcp"), canary_timeout_s=0.2) as (sender, receiver):
        landing = transport(receiver, "shm")
        landing.land = lambda arrival: None  # type: ignore[method-assign]
        report = await probe(sender, receiver)
        assert (report.transport, report.failed) == ("tcp", ("shm: no verdict on the canary within 0.2 s",))


async def test_another_process_than_the_announced_one_does_not_pass() -> None:
    """Its memory is read, whole and with the right checksums, but it does not show this sender's pattern."""
    async with running("decode-0") as node, raw_peer(node) as peer:
        await peer.shake_hands()
        connection = await peer.connect()
        body = pattern(nonce_of(peer.identity), LAYOUT.block_bytes)
        for index, nonce in enumerate((nonce_of(peer.identity), nonce_of(peer.identity) ^ 1)):
            entry = BlockEntry(Slot(index, 0, nonce), checksum(body), 0)
            head = frames.pack_blocks(
                FrameKind.BLOCKS, peer.pair_fence, peer.reply.data_token, [entry], LAYOUT.block_bytes
            )
            await connection.send(head + body)
            frame = await connection.next_frame()
            assert frame is not None
            assert frames.parse_verdicts(frame[2]) == (((0,), ()) if index == 0 else ((), (1,)))


async def test_a_canary_needs_the_token_of_the_pair() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        await peer.shake_hands()
        connection = await peer.connect()
        row = bytes(node.memory.rows.row(node.memory.canary_row(3)))
        entry = BlockEntry(Slot(0, 0, 1), 0, 0)
        head = frames.pack_blocks(FrameKind.BLOCKS, peer.pair_fence, bytes(32), [entry], LAYOUT.block_bytes)
        await connection.send(head + bytes([1]) * LAYOUT.block_bytes)
        assert await connection.until_closed() == [FrameKind.CLOSE]
        assert node.memory.rows.row(node.memory.canary_row(3)) == row


async def test_a_sender_may_have_only_so_many_canaries_waiting() -> None:
    async with running("decode-0", transports=("shm",)) as node, raw_peer(node) as peer:
        source = HostBlockMemory(4, LAYOUT.block_bytes)
        await peer.shake_hands("shm", Offer(host_id(), source.shared))
        landing = transport(node, "shm")
        landing.land = lambda arrival: None  # type: ignore[method-assign]  # none of them ever ends
        connection = await peer.connect()
        for index in range(10):
            entry = BlockEntry(Slot(index, 0, 1), 0, 0)
            await connection.send(
                frames.pack_blocks(
                    FrameKind.BLOCK_REFS, peer.pair_fence, peer.reply.data_token, [entry], LAYOUT.block_bytes
                )
            )
        assert FrameKind.CLOSE in await connection.until_closed()
        source.close()


async def test_a_receiver_that_knows_no_canaries_is_used_all_the_same() -> None:
    async with two("tcp") as (sender, receiver):
        side = receiver.agent._receiving

        def old_version(inlet: Any, pair: Any, header: Any, entries: Any) -> Any:
            inlet.send_gone(header.fence, TransferCode.UNKNOWN_HANDOFF, "no such handoff here")
            return pair.transport.land(Arrival(header.fence, entries, set(), None, inlet.resume, lambda landed: None))

        side._canaries.push = old_version  # type: ignore[method-assign]
        report = await probe(sender, receiver)
        assert (report.transport, report.is_verified) == ("tcp", False)
        await hand_over(sender, receiver, Prompt([1, 2]))


# A transport that begins to fail.


async def test_a_handoff_goes_on_by_the_next_transport_when_one_spoils_its_blocks() -> None:
    async with two(("shm", "tcp")) as (sender, receiver):
        await hand_over(sender, receiver, Prompt([9], request_id="before"))
        spoil(receiver, "shm")
        prompt = Prompt([3, 1, 8])
        report = await hand_over(sender, receiver, prompt)
        assert_arrived(sender, receiver, prompt)
        assert report.transport == "tcp"
        assert len(report.fallbacks) == 1
        assert report.fallbacks[0].startswith("shm: ")
        assert "arrived corrupt" in report.fallbacks[0]
        _, received = receiver.host.commits[prompt.key]
        assert (received.transport, received.fallbacks) == ("tcp", report.fallbacks)
        assert sender.agent.stats().fallbacks == {"shm": 1}
        later = await hand_over(sender, receiver, Prompt([4], request_id="later"))
        assert (later.transport, later.fallbacks) == ("tcp", ())


async def test_all_handoffs_under_way_move_together() -> None:
    async with two(("inproc", "tcp")) as (sender, receiver):
        prompts = [Prompt([i, i + 8, i + 16], request_id=f"r{i}") for i in range(8)]
        handoffs = [open_handoff(sender, receiver, prompt) for prompt in prompts]
        for handoff, prompt in zip(handoffs, prompts, strict=True):
            handoff.blocks_ready({0: prompt.block_ids[0]})
        await eventually(lambda: receiver.agent.stats().bytes_received["inproc"] == 8 * LAYOUT.block_bytes)
        spoil(receiver, "inproc")
        for handoff, prompt in zip(handoffs, prompts, strict=True):
            handoff.blocks_ready({1: prompt.block_ids[1], 2: prompt.block_ids[2]})
        reports = await asyncio.gather(*(handoff.commit(kv_agents.FIRST_TOKEN) for handoff in handoffs))
        for prompt in prompts:
            assert_arrived(sender, receiver, prompt)
        assert {report.transport for report in reports} == {"tcp"}
        assert sender.agent.stats().failures == receiver.agent.stats().failures == {}
        assert receiver.host.releases == []
        assert len(receiver.agent._receiving._pairs) == 1


async def test_a_transport_that_failed_is_tried_again_after_a_while() -> None:
    async with two(("shm", "tcp"), transport_retry_s=0.0) as (sender, receiver):
        is_bad = True
        spoil(receiver, "shm", when=lambda: is_bad)
        assert (await probe(sender, receiver)).transport == "tcp"
        is_bad = False
        assert (await hand_over(sender, receiver, Prompt([1]))).transport == "shm"


async def test_when_every_transport_fails_the_handoff_fails_and_frees_everything() -> None:
    async with two(("shm", "inproc")) as (sender, receiver):
        await hand_over(sender, receiver, Prompt([9], request_id="before"))
        spoil(receiver, "shm")
        spoil(receiver, "inproc")
        with pytest.raises(TransferError) as caught:
            await hand_over(sender, receiver, Prompt([1, 2]))
        assert caught.value.code is TransferCode.PEER_LOST
        assert "inproc: the canary arrived corrupt" in caught.value.message
        await eventually(lambda: receiver.agent.stats().num_receiving == 0)
        free: Host = receiver.host
        await eventually(lambda: len(free.free) == receiver.memory.num_blocks - 1)


async def test_a_canary_finds_out_between_handoffs_that_a_transport_has_gone_bad() -> None:
    async with two(("shm", "tcp")) as (sender, receiver):
        assert (await probe(sender, receiver)).transport == "shm"
        spoil(receiver, "shm")
        report = await probe(sender, receiver)
        assert (report.transport, report.failed) == ("tcp", ("shm: the canary arrived corrupt",))


# As a gateway asks for it.


async def ask(sender: Node, request: pb.ProbeRequest) -> pb.ProbeResponse:
    async with open_local_channel(sender.address) as channel:
        response: pb.ProbeResponse = await pb_grpc.KVTransferServiceStub(channel).Probe(request, timeout=60)
        return response


def probe_request(sender: Node, receiver: Node) -> pb.ProbeRequest:
    return pb.ProbeRequest(
        sender=wire.identity_to_wire(sender.identity),
        receiver=wire.identity_to_wire(receiver.identity),
        receiver_address=receiver.address,
    )


async def test_a_worker_probes_another_one_on_request() -> None:
    async with two(("shm", "tcp")) as (sender, receiver):
        response = await ask(sender, probe_request(sender, receiver))
        assert not response.HasField("refusal")
        assert (response.transport, response.verified, list(response.failed)) == ("shm", True, [])
        assert response.rtt_ms > 0
        assert response.gb_per_s > 0
        spoil(receiver, "shm")
        response = await ask(sender, probe_request(sender, receiver))
        assert (response.transport, list(response.failed)) == ("tcp", ["shm: the canary arrived corrupt"])


async def test_verdicts_about_nothing_while_the_link_is_being_made_change_nothing() -> None:
    """A peer may say anything at any time; before the canary is through there is nothing to fall back from."""
    async with two() as (sender, receiver):
        pairs = sender.agent._sending._pairs
        pair = OutgoingPair(
            pairs._context, receiver.identity, pairs._context.connect("h:1"), pairs._linker, lambda pair: None
        )
        pair.on_verdicts(b"no fence of this", (1,), (2, 3))
        assert pair._relinking is None
        await pair.close()


async def test_a_probe_says_why_two_workers_cannot_pair() -> None:
    other = Compatibility("another model", LAYOUT)
    async with running("prefill-0", compatibility=other) as sender, running("decode-0") as receiver:
        refusal = (await ask(sender, probe_request(sender, receiver))).refusal
        assert (refusal.code, refusal.message) == (
            TransferCode.INCOMPATIBLE,
            "model fingerprint: 'model' here, 'another model' there",
        )
        assert not receiver.agent._receiving._pairs


async def test_a_probe_meant_for_another_process_is_refused() -> None:
    async with two() as (sender, receiver):
        request = probe_request(sender, receiver)
        request.sender.incarnation = "other"
        refusal = (await ask(sender, request)).refusal
        assert refusal.code == TransferCode.STALE
        assert not sender.agent._sending._pairs._pairs


async def test_a_malformed_probe_names_the_field() -> None:
    async with two() as (sender, receiver):
        request = probe_request(sender, receiver)
        request.receiver_address = ""
        with pytest.raises(grpc.aio.AioRpcError, match="receiver_address: 0 characters, not 1 to 512"):
            await ask(sender, request)
