"""Messages as protobuf: there and back, and what a servicer does with malformed ones."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from helpers import kv_names as kv
from helpers.kv_agents import COMPATIBILITY, Node, options, running
from helpers.kv_raw_peer import raw_peer, scripted_receiver

from baton.api.common.v1 import common_pb2
from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.api.kvtransfer.v1.kvtransfer_pb2_grpc import KVTransferServiceStub
from baton.kvtransfer import messages as m
from baton.kvtransfer import wire
from baton.kvtransfer.errors import RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.handshake import Handshake, HandshakeReply
from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.service import KVTransferClient, open_local_channel
from baton.kvtransfer.transport.base import Offer

TOKEN_WITH_LOGPROBS = m.FirstToken(5, -0.5, ((5, -0.5), (6, -1.5)))
COMMIT = m.Commit(kv.HANDOFF, b"d" * 16, TOKEN_WITH_LOGPROBS, 2**40, 0)
RESERVE = m.Reserve(kv.HANDOFF, kv.names(3), 40, "tcp")
GRANT = m.Grant(kv.HANDOFF, (m.Slot(0, 2**32 - 1, 2**64 - 1), m.Slot(2, 0, 1)), 15.0, kv.TOKEN)
REFUSE = m.Refuse(kv.HANDOFF, TransferCode.NO_CAPACITY, "full")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shared", [None, SharedMemory(7, 9, 2**40, b"n" * 16)])
def test_a_handshake_there_and_back(shared: SharedMemory | None, version: int) -> None:
    handshake = Handshake(kv.SENDER, kv.RECEIVER, COMPATIBILITY, ("shm", "tcp"), Offer("host", shared))
    assert wire.handshake_from_wire(wire.handshake_to_wire(handshake)) == handshake
    reply = HandshakeReply("tcp", "127.0.0.1:1", kv.TOKEN, version)
    assert wire.handshake_reply_from_wire(wire.handshake_reply_to_wire(reply, kv.RECEIVER)) == reply


def test_what_failed_before_travels_with_the_handshake() -> None:
    failed = ("shm: the canary arrived corrupt", "nixl: " + "x" * 994)
    handshake = Handshake(kv.SENDER, kv.RECEIVER, COMPATIBILITY, ("tcp",), Offer("host", None), failed, True)
    assert wire.handshake_from_wire(wire.handshake_to_wire(handshake)) == handshake


def test_what_transports_need_travels_with_the_handshake() -> None:
    tickets = {"inproc": b"n" * 16, "other": b"x" * 65536}
    handshake = Handshake(kv.SENDER, kv.RECEIVER, COMPATIBILITY, ("inproc",), Offer("host", None, tickets))
    assert wire.handshake_from_wire(wire.handshake_to_wire(handshake)) == handshake


@pytest.mark.parametrize(
    ("offers", "problem"),
    [
        ([pb.TransportOffer(transport="inproc")], "offers.data: 0 bytes, not 1 to 65536"),
        ([pb.TransportOffer(transport="inproc", data=bytes(65537))], "offers.data: 65537 bytes, not 1 to 65536"),
        ([pb.TransportOffer(transport="inproc", data=b"x")] * 17, "offers: 17, at most 16"),
    ],
)
def test_offers_are_bounded(offers: list[pb.TransportOffer], problem: str) -> None:
    handshake = Handshake(kv.SENDER, kv.RECEIVER, COMPATIBILITY, ("inproc",), Offer("host", None))
    request = wire.handshake_to_wire(handshake)
    request.offers.extend(offers)
    with pytest.raises(ValueError, match=problem):
        wire.handshake_from_wire(request)


def test_messages_there_and_back() -> None:
    assert wire.reserve_from_wire(wire.reserve_to_wire(RESERVE)) == RESERVE
    assert wire.commit_from_wire(wire.commit_to_wire(COMMIT)) == COMMIT
    abort = m.Abort(kv.HANDOFF, TransferCode.EXPIRED, "late")
    assert wire.abort_from_wire(wire.abort_to_wire(abort)) == abort
    plain = m.Commit(kv.HANDOFF, b"d" * 16, m.FirstToken(0), 0, 0)
    assert wire.commit_from_wire(wire.commit_to_wire(plain)) == plain


@pytest.mark.parametrize("answer", [GRANT, m.Grant(kv.HANDOFF, (), 0.5, kv.TOKEN), REFUSE])
def test_answers_to_a_reservation_there_and_back(answer: m.Grant | m.Refuse) -> None:
    assert wire.reserve_answer_from_wire(wire.reserve_answer_to_wire(answer), kv.HANDOFF) == answer


@pytest.mark.parametrize("answer", [m.Ack(kv.HANDOFF), m.Incomplete(kv.HANDOFF, 0, (0, 2)), REFUSE])
def test_answers_to_a_commit_there_and_back(answer: m.Ack | m.Incomplete | m.Refuse) -> None:
    assert wire.commit_answer_from_wire(wire.commit_answer_to_wire(answer), COMMIT) == answer


def test_a_code_that_only_a_newer_version_knows_is_an_abort() -> None:
    answer = pb.ReserveResponse(refusal=pb.Refusal(code="brand_new", message="why"))
    assert wire.reserve_answer_from_wire(answer, kv.HANDOFF) == m.Refuse(kv.HANDOFF, TransferCode.ABORTED, "why")


def test_reasons_are_cut_to_a_bound() -> None:
    assert len(wire.refusal_to_wire(TransferCode.INTERNAL, "x" * 10_000).message) == 1000


def good_reserve() -> pb.ReserveRequest:
    return wire.reserve_to_wire(RESERVE)


def good_handshake() -> pb.HandshakeRequest:
    shared = SharedMemory(7, 9, 4096, b"n" * 16)
    return wire.handshake_to_wire(Handshake(kv.SENDER, kv.RECEIVER, COMPATIBILITY, ("tcp",), Offer("host", shared)))


def spoil(message: Any, path: str, value: Any) -> Any:
    *parents, name = path.split(".")
    target = message
    for parent in parents:
        target = getattr(target, parent)
    if value is None:
        target.ClearField(name)
    elif isinstance(value, list):
        target.ClearField(name)
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)
    return message


MALFORMED = [
    ("Reserve", "handoff.request_id", "", "request_id"),
    ("Reserve", "handoff.request_id", "x" * 300, "request_id"),
    ("Reserve", "handoff.attempt", 0, "attempt"),
    ("Reserve", "handoff", None, "request_id"),
    ("Reserve", "endpoints", None, "endpoints.sender.worker_id"),
    ("Reserve", "endpoints.sender.incarnation", "", "endpoints.sender.incarnation"),
    ("Reserve", "endpoints.receiver.worker_id", "x" * 65, "endpoints.receiver.worker_id"),
    ("Commit", "manifest_digest", b"short", "manifest_digest"),
    ("Commit", "handoff.attempt", 0, "attempt"),
    ("Abort", "endpoints", None, "endpoints.sender.worker_id"),
    ("Heartbeat", "endpoints", None, "endpoints.sender.worker_id"),
    ("Heartbeat", "live", [pb.HandoffKey(request_id="r")], "attempt"),
    ("Handshake", "compatibility.layout.dtype", "float8", "float8"),
    ("Handshake", "compatibility.layout.num_layers", 0, "num_layers"),
    ("Handshake", "compatibility", None, "dtype"),
    ("Handshake", "compatibility.layout.dtype", "ä" * 20_000, "dtype"),
    ("Handshake", "transports", ["tcp"] * 17, "transports"),
    ("Handshake", "shared_memory.nonce", b"short", "shared_memory.nonce"),
    ("Handshake", "shared_memory.num_bytes", 0, "shared_memory.num_bytes"),
]
GOOD = {
    "Reserve": good_reserve,
    "Commit": lambda: wire.commit_to_wire(COMMIT),
    "Abort": lambda: wire.abort_to_wire(m.Abort(kv.HANDOFF, TransferCode.ABORTED, "why")),
    "Heartbeat": lambda: pb.HeartbeatRequest(endpoints=wire.endpoints_to_wire(kv.SENDER, kv.RECEIVER)),
    "Handshake": good_handshake,
}


@pytest.mark.parametrize(("method", "path", "value", "named"), MALFORMED)
async def test_a_malformed_request_is_an_invalid_argument_that_names_the_field(
    method: str, path: str, value: Any, named: str
) -> None:
    async with running("decode-0") as node, open_local_channel(node.address) as channel:
        call = getattr(KVTransferServiceStub(channel), method)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(spoil(GOOD[method](), path, value), timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert named in (caught.value.details() or "")
        await call(GOOD[method](), timeout=5)  # the next one is heard


@pytest.mark.parametrize(
    ("names", "num_tokens"),
    [
        ((b"n" * 16,), 0),
        ((b"n" * 16,), 17),
        ((b"n" * 16, b"m" * 16), 16),
        ((), 0),
        ((b"short",), 16),
        ((b"n" * 16,), 2**32 - 1),
    ],
)
async def test_a_manifest_that_does_not_add_up_is_refused_before_the_host_is_asked(
    names: tuple[bytes, ...], num_tokens: int
) -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        await peer.shake_hands()
        node.agent.expect(peer.handoff().key, peer.identity)
        answer = await peer.client.reserve(m.Reserve(peer.handoff(), names, num_tokens, "tcp"), 5.0)
        assert isinstance(answer, m.Refuse)
        assert answer.code is TransferCode.PROTOCOL
        assert node.host.slots == {}


async def test_without_a_handshake_nothing_is_heard() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        handoff = peer.handoff()
        node.agent.expect(handoff.key, peer.identity)
        answer = await peer.client.reserve(m.Reserve(handoff, kv.names(1), 16, "tcp"), 5.0)
        assert isinstance(answer, m.Refuse)
        assert answer.code is TransferCode.STALE
        assert (await peer.commit(handoff, {}, kv.names(1))).code is TransferCode.STALE  # type: ignore[attr-defined]
        with pytest.raises(TransferError, match="no handshake"):
            await peer.client.heartbeat(peer.identity, node.identity, [handoff.key])
        await peer.abort(handoff)
        assert node.agent.stats().fenced == 3
        assert node.agent._receiving._handoffs == {}


async def test_the_answer_to_a_heartbeat_names_what_is_over() -> None:
    async with running("decode-0") as node, raw_peer(node) as peer:
        await peer.shake_hands()
        alive, over, unknown = (peer.handoff(name) for name in ("alive", "over", "unknown"))
        await peer.reserve(alive, kv.names(1))
        await peer.reserve(over, kv.names(1))
        await peer.abort(over)
        keys = [handoff.key for handoff in (alive, over, unknown)]
        reply = await peer.client.heartbeat(peer.identity, node.identity, keys)
        assert reply.unknown == {over.key, unknown.key}


@pytest.mark.parametrize(
    "response",
    [
        pb.ReserveResponse(),
        pb.ReserveResponse(grant=pb.Grant(lease_ms=1000, transfer_token=b"short")),
        pb.ReserveResponse(grant=pb.Grant(lease_ms=0, transfer_token=kv.TOKEN)),
    ],
)
async def test_a_nonsense_answer_is_the_peers_mistake(response: pb.ReserveResponse) -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return response.SerializeToString()

    async with scripted_receiver(answer, timeout_s=5.0) as client:
        with pytest.raises(RemoteProtocolError, match="answered nonsense"):
            await client.reserve(RESERVE, 5.0)
        await client.close()
        with pytest.raises(TransferError, match="closed"):
            await client.reserve(RESERVE, 5.0)


async def test_a_peer_that_is_not_there_is_lost_and_named() -> None:
    client = KVTransferClient(open_local_channel("127.0.0.1:1"), "127.0.0.1:1", timeout_s=5.0)
    with pytest.raises(TransferError, match=r"127\.0\.0\.1:1 answered UNAVAILABLE") as caught:
        await client.abort(m.Abort(kv.HANDOFF, TransferCode.ABORTED, "why"))
    assert caught.value.code is TransferCode.PEER_LOST
    await client.close()


async def test_a_call_that_is_open_when_the_channel_is_closed_fails_and_is_not_taken_for_cancelled() -> None:
    """gRPC ends it as if who awaits it had been cancelled; whoever believed that would do nothing any more."""
    is_asked = asyncio.Event()

    async def answer(request: bytes, context: Any) -> bytes:
        is_asked.set()
        await asyncio.Event().wait()
        return b""

    async with scripted_receiver(answer) as client:
        asking = asyncio.ensure_future(client.reserve(RESERVE, 30.0))
        await is_asked.wait()
        await client.close()
        with pytest.raises(TransferError, match="closed") as caught:
            await asking
    assert caught.value.code is TransferCode.PEER_LOST


async def test_draining_peers_say_so() -> None:
    async with running("decode-0", options=options()) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        await closed(node)
        answer = await peer.client.reserve(m.Reserve(peer.handoff(), kv.names(1), 16, "tcp"), 5.0)
        assert isinstance(answer, m.Refuse)
        assert answer.code is TransferCode.DRAINING


async def closed(node: Node) -> None:
    await node.agent._receiving.close()


def test_identities_are_kept_apart() -> None:
    identity = common_pb2.WorkerIdentity(worker_id="a", incarnation="b")
    assert wire.identity_to_wire(wire.identity_from_wire(identity, "x")) == identity
