"""Versions of the wire: what two sides agree on, in every combination, by each transport; and what no version allows."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from google.protobuf.message import Message
from helpers import kv_names as kv
from helpers.kv_agents import (
    COMPATIBILITY,
    Prompt,
    assert_arrived,
    each_transport,
    failure_of,
    hand_over,
    options,
    running,
)
from helpers.kv_raw_peer import BLOCK, blocks_frame, raw_peer
from helpers.waiting import eventually
from hypothesis import given
from hypothesis import strategies as st

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.api.kvtransfer.v1.kvtransfer_pb2_grpc import KVTransferServiceStub
from baton.kvtransfer import messages as m
from baton.kvtransfer import wire
from baton.kvtransfer.errors import Incompatible, RemoteProtocolError, TransferCode
from baton.kvtransfer.handshake import Handshake, choose_version
from baton.kvtransfer.layout import Compatibility
from baton.kvtransfer.service import open_local_channel
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.transport.frames import FrameKind
from baton.kvtransfer.versions import WIRE_VERSIONS, VersionRange, common_version

RANGES = st.tuples(st.integers(1, 9), st.integers(0, 4)).map(lambda drawn: VersionRange(drawn[0], sum(drawn)))
EACH_VERSION = range(WIRE_VERSIONS.oldest, WIRE_VERSIONS.newest + 1)


def test_the_version_before_the_newest_is_spoken() -> None:
    assert WIRE_VERSIONS.newest - 1 in WIRE_VERSIONS


@given(RANGES, RANGES)
def test_the_newest_version_that_both_speak_is_chosen(one: VersionRange, other: VersionRange) -> None:
    both = [version for version in range(1, 20) if version in one and version in other]
    assert common_version(one, other) == common_version(other, one) == (max(both) if both else None)


@pytest.mark.parametrize("bounds", [(0, 1), (2, 1), (-1, 2)])
def test_a_range_that_cannot_be_is_none(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="wire versions"):
        VersionRange(*bounds)


@pytest.mark.parametrize(
    ("here", "there", "upgrade"),
    [((1, 2), (3, 4), "decode-0"), ((3, 4), (1, 2), "prefill-0"), ((2, 2), (1, 1), "prefill-0")],
)
def test_without_a_common_version_both_ranges_are_named_and_who_is_the_older(
    here: tuple[int, int], there: tuple[int, int], upgrade: str
) -> None:
    ours, theirs = VersionRange(*here), VersionRange(*there)
    handshake = Handshake(
        kv.SENDER, kv.RECEIVER, Compatibility("model", COMPATIBILITY.layout, theirs), ("tcp",), Offer("host", None)
    )
    with pytest.raises(Incompatible) as caught:
        choose_version(handshake, Compatibility("model", COMPATIBILITY.layout, ours))
    assert f"{kv.RECEIVER} speaks {ours}, {kv.SENDER} speaks {theirs}" in caught.value.message
    assert caught.value.message.endswith(f"upgrade {upgrade}")


@each_transport
@pytest.mark.parametrize("receiver_version", EACH_VERSION)
@pytest.mark.parametrize("sender_version", EACH_VERSION)
async def test_each_version_hands_over_to_each_by_each_transport(
    sender_version: int, receiver_version: int, transport: str
) -> None:
    """With canaries, so that those go by the version of the pair as well, and more blocks than a frame of version 1 has."""
    common: dict[str, Any] = {"transports": transport, "num_blocks": 128}
    async with (
        running("prefill-0", options=options(canary_bytes=1, newest_wire_version=sender_version), **common) as sender,
        running(
            "decode-0", options=options(canary_bytes=1, newest_wire_version=receiver_version), **common
        ) as receiver,
    ):
        sender.fill(1)
        receiver.fill(2)
        prompt = Prompt(list(range(100)))
        report = await hand_over(sender, receiver, prompt)
        assert (report.transport, report.num_blocks) == (transport, 100)
        assert_arrived(sender, receiver, prompt)
        (pair,) = receiver.agent._receiving._pairs.values()
        assert pair.version == min(sender_version, receiver_version)
        assert (await sender.agent.probe(receiver.identity, receiver.address)).is_verified


async def test_a_pinned_worker_says_so_and_cannot_be_pinned_below_what_it_speaks() -> None:
    async with running("decode-0", options=options(newest_wire_version=1)) as node:
        assert node.agent.compatibility.versions == VersionRange(1, 1)
    with pytest.raises(ValueError, match="wire versions from 1 to 0"):
        async with running("decode-0", options=options(newest_wire_version=0)):
            pass


@pytest.mark.parametrize("version", [3, 99])
async def test_a_receiver_that_chooses_what_was_not_offered_is_refused(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.kvtransfer.receiving.choose_version", lambda theirs, ours: version)
    async with running("prefill-0") as sender, running("decode-0") as receiver:
        error = await failure_of(sender, receiver, Prompt([1]))
        assert error.code is TransferCode.PROTOCOL
        assert f"chose wire version {version}; 1 to 2 was offered" in error.message


@pytest.mark.parametrize("spoken", EACH_VERSION)
@pytest.mark.parametrize("moment", ["hello", "blocks"])
async def test_frames_of_another_version_than_the_pairs_end_the_connection(spoken: int, moment: str) -> None:
    pair_version = 3 - spoken
    pinned = options(newest_wire_version=pair_version)
    async with running("decode-0", options=pinned) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        assert peer.reply.version == pair_version
        handoff = peer.handoff()
        grant = await peer.reserve(handoff, kv.names(1))
        before = node.contents()
        good_hello = frames.pack_hello(peer.pair_fence, peer.reply.data_token, pair_version)
        bad_hello = frames.pack_hello(peer.pair_fence, peer.reply.data_token, spoken)
        connection = await peer.connect(hello=good_hello if moment == "blocks" else bad_hello)
        if moment == "blocks":
            frame = bytearray(blocks_frame(handoff, grant, {0: bytes(BLOCK)}))
            frame[4:6] = spoken.to_bytes(2, "little")
            await connection.send(bytes(frame))
        frame_back = await connection.next_frame()
        assert frame_back is not None
        assert frame_back[0] is FrameKind.CLOSE
        assert frames.parse_text(frame_back[2])[0] is TransferCode.PROTOCOL
        assert node.contents() == before


@pytest.mark.parametrize(("version", "most"), [(1, 64), (2, 512)])
def test_a_frame_has_as_many_entries_as_its_version_allows(version: int, most: int) -> None:
    assert frames.max_entries(version) == most
    entries = [(kv.slots(index)[0], 1, 0) for index in range(most + 1)]
    whole = frames.pack_blocks(FrameKind.BLOCKS, bytes(16), bytes(32), entries[:most], BLOCK, version)
    assert frames.parse_header(whole[: frames.HEADER_BYTES]).count == most
    more = frames.pack_blocks(FrameKind.BLOCKS, bytes(16), bytes(32), entries, BLOCK, version)
    with pytest.raises(RemoteProtocolError, match=f"{most + 1} entries"):
        frames.parse_header(more[: frames.HEADER_BYTES])
    verdicts, kinds = frames.pack_verdicts(bytes(16), range(most + 1), (), version), []
    while verdicts:
        header = frames.parse_header(verdicts[: frames.HEADER_BYTES])
        kinds.append((header.version, header.count))
        verdicts = verdicts[frames.HEADER_BYTES + header.body_bytes :]
    assert kinds == [(version, most), (version, 1)]


# What a newer version may say, said between two that agreed on this one.


def with_unknown_field(message: Message, number: int, data: bytes, inside: str = "") -> bytes:
    """The message with a field of bytes in it that its schema does not have, or in the part of it called ``inside``."""
    extra = pb.HandoffKey()  # any message: what it does not know it keeps, and writes again
    tag = (number << 3) | 2
    raw = b""
    while tag > 127:
        raw, tag = raw + bytes([tag & 127 | 128]), tag >> 7
    raw += bytes([tag, len(data)]) + data
    extra.MergeFromString(raw)
    (getattr(message, inside) if inside else message).MergeFromString(extra.SerializeToString())
    return message.SerializeToString()


UNKNOWN_NUMBERS = st.integers(20, 2**20)
SAID_IN_A_PAIR: dict[str, Any] = {
    "Reserve": lambda handoff: wire.reserve_to_wire(m.Reserve(handoff, kv.names(1), 16, "tcp")),
    "Commit": lambda handoff: wire.commit_to_wire(m.Commit(handoff, bytes(16), m.FirstToken(1), 0, 1)),
    "Abort": lambda handoff: wire.abort_to_wire(m.Abort(handoff, TransferCode.ABORTED, "a test")),
    "Heartbeat": lambda handoff: pb.HeartbeatRequest(
        endpoints=wire.endpoints_to_wire(handoff.sender, handoff.receiver), live=[wire.key_to_wire(handoff.key)]
    ),
}


@pytest.mark.parametrize("method", SAID_IN_A_PAIR)
@given(number=UNKNOWN_NUMBERS, data=st.binary(max_size=100), is_inside=st.booleans())
def test_a_message_with_a_field_of_a_newer_version_is_malformed(
    method: str, number: int, data: bytes, is_inside: bool
) -> None:
    message = SAID_IN_A_PAIR[method](kv.HANDOFF)
    wire.check_known(message)
    spoilt = type(message)()
    spoilt.ParseFromString(with_unknown_field(message, number, data, "endpoints" if is_inside else ""))
    with pytest.raises(ValueError, match="fields that the version of this pair does not have"):
        wire.check_known(spoilt)


@pytest.mark.parametrize("method", SAID_IN_A_PAIR)
async def test_such_a_message_is_refused_and_changes_nothing(method: str) -> None:
    async with running("decode-0") as node, raw_peer(node) as peer, open_local_channel(node.address) as channel:
        await peer.shake_hands()
        handoff = peer.handoff()
        grant = await peer.reserve(handoff, kv.names(1))
        spoilt = with_unknown_field(SAID_IN_A_PAIR[method](handoff), 77, b"fp8")
        path = f"/{pb.DESCRIPTOR.services_by_name['KVTransferService'].full_name}/{method}"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(path)(spoilt, timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the version of this pair does not have" in (caught.value.details() or "")
        # The handoff goes on as if nothing had been said.
        connection = await peer.connect()
        await connection.send(blocks_frame(handoff, grant, {0: bytes(BLOCK)}))
        await connection.next_frame()
        assert isinstance(await peer.commit(handoff, {0: bytes(BLOCK)}, kv.names(1)), m.Ack)


async def test_in_the_handshake_what_a_newer_worker_adds_is_no_obstacle() -> None:
    async with running("decode-0") as node, open_local_channel(node.address) as channel:
        ours = Handshake(kv.SENDER, node.identity, COMPATIBILITY, ("tcp",), Offer("host", None))
        request = pb.HandshakeRequest.FromString(with_unknown_field(wire.handshake_to_wire(ours), 99, b"new"))
        request.compatibility.newest_protocol_version = 7
        response = await KVTransferServiceStub(channel).Handshake(request, timeout=30)
        assert not response.HasField("refusal")
        assert response.protocol_version == WIRE_VERSIONS.newest


@given(st.integers(len(FrameKind) + 1, 255), st.sampled_from(list(EACH_VERSION)))
def test_a_kind_of_frame_of_a_newer_version_is_refused(kind: int, version: int) -> None:
    header = bytearray(frames.pack_hello(bytes(16), bytes(32), version))
    header[6] = kind
    with pytest.raises(RemoteProtocolError, match=f"frame kind {kind}"):
        frames.parse_header(header)


async def test_what_only_version_2_has_is_refused_in_a_pair_of_version_1() -> None:
    pinned = options(newest_wire_version=1)
    async with running("decode-0", options=pinned) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        handoff = peer.handoff()
        node.agent.expect(handoff.key, peer.identity)
        answer = await peer.client.reserve(m.Reserve(handoff, kv.names(1), 16, "tcp"), 30.0, 2)
        assert isinstance(answer, m.Refuse)
        assert answer.code is TransferCode.PROTOCOL
        assert answer.reason == "answer_within_ms between two that speak version 1"
        assert node.host.slots == {}
        # And without it the very same reservation is granted.
        assert isinstance(await peer.client.reserve(m.Reserve(handoff, kv.names(1), 16, "tcp"), 30.0, 1), m.Grant)
        await eventually(lambda: node.agent.stats().num_receiving == 1)
