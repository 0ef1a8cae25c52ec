"""The protocol's messages as protobuf and back. What comes in is checked; a malformed one is a ValueError with the field."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import Message

from baton.api.common.v1 import common_pb2
from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.fetch import NO_TOKEN, Fetch
from baton.kvtransfer.handshake import Handshake, HandshakeReply
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.layout import Compatibility, KVLayout
from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.versions import VersionRange

_MAX_REQUEST_ID_CHARS = 256
_MAX_IDENTITY_CHARS = 64
_MAX_REASON_CHARS = 1000
_MAX_TRANSPORTS = 16
_MAX_TICKET_BYTES = 64 * 1024
_MAX_ADDRESS_CHARS = 512
_MAX_UINT32 = (1 << 32) - 1
TOKEN_BYTES = 32
DIGEST_BYTES = 16
# What a receiver speaks that does not say: the first version had no range to agree on.
_UNSAID_VERSION = 1


def _need(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{field}: {problem}")


def check_known(wire: Message) -> None:
    """Raises ValueError for a message with fields, at any depth, that are not of a version that we speak.

    Such a field may change what the others mean. In the handshake it may not, and is ignored: there a newer worker says what
    it could do. Anywhere else a peer only says what the version of the pair has.
    """
    size = wire.ByteSize()
    wire.DiscardUnknownFields()
    unknown = size - wire.ByteSize()
    _need(not unknown, wire.DESCRIPTOR.name, f"{unknown} bytes of fields that the version of this pair does not have")


# Who.


def identity_to_wire(identity: WorkerIdentity) -> common_pb2.WorkerIdentity:
    return common_pb2.WorkerIdentity(worker_id=identity.worker_id, incarnation=identity.incarnation)


def identity_from_wire(wire: common_pb2.WorkerIdentity, field: str) -> WorkerIdentity:
    for name in ("worker_id", "incarnation"):
        length = len(getattr(wire, name))
        _need(
            0 < length <= _MAX_IDENTITY_CHARS, f"{field}.{name}", f"{length} characters, not 1 to {_MAX_IDENTITY_CHARS}"
        )
    return WorkerIdentity(wire.worker_id, wire.incarnation)


def key_to_wire(key: HandoffKey) -> pb.HandoffKey:
    return pb.HandoffKey(request_id=key.request_id, attempt=key.attempt)


def key_from_wire(wire: pb.HandoffKey) -> HandoffKey:
    length = len(wire.request_id)
    _need(0 < length <= _MAX_REQUEST_ID_CHARS, "request_id", f"{length} characters, not 1 to {_MAX_REQUEST_ID_CHARS}")
    _need(wire.attempt > 0, "attempt", "counts from 1")
    return HandoffKey(wire.request_id, wire.attempt)


def endpoints_to_wire(sender: WorkerIdentity, receiver: WorkerIdentity) -> pb.Endpoints:
    return pb.Endpoints(sender=identity_to_wire(sender), receiver=identity_to_wire(receiver))


def endpoints_from_wire(wire: pb.Endpoints) -> tuple[WorkerIdentity, WorkerIdentity]:
    return identity_from_wire(wire.sender, "endpoints.sender"), identity_from_wire(wire.receiver, "endpoints.receiver")


def handoff_from_wire(key: pb.HandoffKey, endpoints: pb.Endpoints) -> HandoffId:
    return HandoffId(key_from_wire(key), *endpoints_from_wire(endpoints))


def _who(handoff: HandoffId) -> tuple[pb.HandoffKey, pb.Endpoints]:
    return key_to_wire(handoff.key), endpoints_to_wire(handoff.sender, handoff.receiver)


# What their blocks are.


def compatibility_to_wire(compatibility: Compatibility) -> common_pb2.Compatibility:
    layout = compatibility.layout
    return common_pb2.Compatibility(
        model_fingerprint=compatibility.model_fingerprint,
        protocol_version=compatibility.versions.oldest,
        newest_protocol_version=compatibility.versions.newest,
        layout=common_pb2.KVLayout(
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            dtype=layout.dtype,
            order=layout.order,
        ),
    )


def compatibility_from_wire(wire: common_pb2.Compatibility) -> Compatibility:
    """Raises ValueError for a layout, or a range of versions, that cannot be."""
    w = wire.layout
    layout = KVLayout(w.num_layers, w.num_kv_heads, w.head_dim, w.block_size, w.dtype, w.order)
    return Compatibility(wire.model_fingerprint, layout, versions_from_wire(wire))


def versions_from_wire(wire: common_pb2.Compatibility) -> VersionRange:
    """A worker of version 1 names one version. Raises ValueError for a range that cannot be."""
    return VersionRange(wire.protocol_version, wire.newest_protocol_version or wire.protocol_version)


def handshake_to_wire(handshake: Handshake) -> pb.HandshakeRequest:
    shared = handshake.offer.shared
    return pb.HandshakeRequest(
        endpoints=endpoints_to_wire(handshake.sender, handshake.receiver),
        compatibility=compatibility_to_wire(handshake.compatibility),
        transports=handshake.transports,
        host_id=handshake.offer.host_id,
        failed=[reason[:_MAX_REASON_CHARS] for reason in handshake.failed],
        keeps_handoffs=handshake.keeps_handoffs,
        offers=[pb.TransportOffer(transport=name, data=data) for name, data in handshake.offer.tickets.items()],
        shared_memory=None
        if shared is None
        else pb.SharedMemory(pid=shared.pid, fd=shared.fd, num_bytes=shared.num_bytes, nonce=shared.nonce),
    )


def handshake_from_wire(wire: pb.HandshakeRequest) -> Handshake:
    shared = None
    if wire.HasField("shared_memory"):
        memory = wire.shared_memory
        _need(len(memory.nonce) == 16, "shared_memory.nonce", f"{len(memory.nonce)} bytes, not 16")
        _need(memory.num_bytes > 0, "shared_memory.num_bytes", "must not be 0")
        shared = SharedMemory(memory.pid, memory.fd, memory.num_bytes, memory.nonce)
    _need(len(wire.transports) <= _MAX_TRANSPORTS, "transports", f"{len(wire.transports)}, at most {_MAX_TRANSPORTS}")
    sender, receiver = endpoints_from_wire(wire.endpoints)
    compatibility = compatibility_from_wire(wire.compatibility)
    offer = Offer(wire.host_id, shared, _tickets_from_wire(wire.offers))
    _need(len(wire.failed) <= _MAX_TRANSPORTS, "failed", f"{len(wire.failed)}, at most {_MAX_TRANSPORTS}")
    failed = tuple(reason[:_MAX_REASON_CHARS] for reason in wire.failed)
    transports = tuple(wire.transports)
    return Handshake(sender, receiver, compatibility, transports, offer, failed, wire.keeps_handoffs)


def _tickets_from_wire(offers: Sequence[pb.TransportOffer]) -> dict[str, bytes]:
    _need(len(offers) <= _MAX_TRANSPORTS, "offers", f"{len(offers)}, at most {_MAX_TRANSPORTS}")
    for offer in offers:
        size = len(offer.data)
        _need(0 < size <= _MAX_TICKET_BYTES, "offers.data", f"{size} bytes, not 1 to {_MAX_TICKET_BYTES}")
    return {offer.transport: offer.data for offer in offers}


def probe_from_wire(wire: pb.ProbeRequest) -> tuple[WorkerIdentity, WorkerIdentity, str]:
    """Who is asked to send a canary, to whom, and where that is."""
    length = len(wire.receiver_address)
    _need(0 < length <= _MAX_ADDRESS_CHARS, "receiver_address", f"{length} characters, not 1 to {_MAX_ADDRESS_CHARS}")
    sender, receiver = (identity_from_wire(getattr(wire, name), name) for name in ("sender", "receiver"))
    return sender, receiver, wire.receiver_address


def handshake_reply_to_wire(reply: HandshakeReply, receiver: WorkerIdentity) -> pb.HandshakeResponse:
    return pb.HandshakeResponse(
        receiver=identity_to_wire(receiver),
        transport=reply.transport,
        data_address=reply.data_address,
        data_token=reply.data_token,
        protocol_version=reply.version if reply.version > _UNSAID_VERSION else 0,
    )


def handshake_reply_from_wire(wire: pb.HandshakeResponse) -> HandshakeReply:
    _need(len(wire.data_token) == TOKEN_BYTES, "data_token", f"{len(wire.data_token)} bytes, not {TOKEN_BYTES}")
    version = wire.protocol_version or _UNSAID_VERSION
    return HandshakeReply(wire.transport, wire.data_address, wire.data_token, version)


# What they say.


def refusal_to_wire(code: TransferCode, reason: str) -> pb.Refusal:
    return pb.Refusal(code=code.value, message=reason[:_MAX_REASON_CHARS])


def refusal_from_wire(wire: pb.Refusal) -> TransferError:
    return TransferError(_code(wire.code), wire.message)


def _code(text: str) -> TransferCode:
    """A code that only a newer version knows is treated as if the peer had given up."""
    return TransferCode(text) if text in set(TransferCode) else TransferCode.ABORTED


def _refuse(handoff: HandoffId, wire: pb.Refusal) -> m.Refuse:
    return m.Refuse(handoff, _code(wire.code), wire.message)


def reserve_to_wire(message: m.Reserve) -> pb.ReserveRequest:
    key, endpoints = _who(message.handoff)
    return pb.ReserveRequest(
        handoff=key,
        endpoints=endpoints,
        block_names=message.block_names,
        num_tokens=message.num_tokens,
        transport=message.transport,
    )


def reserve_from_wire(wire: pb.ReserveRequest) -> m.Reserve:
    handoff = handoff_from_wire(wire.handoff, wire.endpoints)
    return m.Reserve(handoff, tuple(wire.block_names), wire.num_tokens, wire.transport)


def reserve_answer_to_wire(answer: m.Grant | m.Refuse | None) -> pb.ReserveResponse:
    """None: still looking."""
    if answer is None:
        return pb.ReserveResponse(waiting=pb.Waiting())
    if isinstance(answer, m.Refuse):
        return pb.ReserveResponse(refusal=refusal_to_wire(answer.code, answer.reason))
    slots = [
        pb.Slot(index=index, block_id=block_id, generation=generation) for index, block_id, generation in answer.slots
    ]
    grant = pb.Grant(slots=slots, lease_ms=round(answer.lease_s * 1e3), transfer_token=answer.token)
    return pb.ReserveResponse(grant=grant)


def reserve_answer_from_wire(wire: pb.ReserveResponse, handoff: HandoffId) -> m.Grant | m.Refuse:
    if wire.WhichOneof("outcome") == "refusal":
        return _refuse(handoff, wire.refusal)
    _need(wire.HasField("grant"), "outcome", "neither a grant nor a refusal")
    token, lease_ms = wire.grant.transfer_token, wire.grant.lease_ms
    _need(len(token) == TOKEN_BYTES, "grant.transfer_token", f"{len(token)} bytes, not {TOKEN_BYTES}")
    _need(lease_ms > 0, "grant.lease_ms", "must not be 0")
    slots = tuple(m.Slot(slot.index, slot.block_id, slot.generation) for slot in wire.grant.slots)
    return m.Grant(handoff, slots, lease_ms / 1e3, token)


def commit_to_wire(message: m.Commit) -> pb.CommitRequest:
    key, endpoints = _who(message.handoff)
    return pb.CommitRequest(
        handoff=key,
        endpoints=endpoints,
        manifest_digest=message.digest,
        first_token=None if message.first_token == NO_TOKEN else _token_to_wire(message.first_token),
        num_bytes=message.num_bytes,
    )


def commit_from_wire(wire: pb.CommitRequest) -> m.Commit:
    size = len(wire.manifest_digest)
    _need(size == DIGEST_BYTES, "manifest_digest", f"{size} bytes, not {DIGEST_BYTES}")
    handoff = handoff_from_wire(wire.handoff, wire.endpoints)
    # One commit is under way at a time and its answer goes back on its own call, so rounds are not sent.
    first_token = _token_from_wire(wire.first_token) if wire.HasField("first_token") else NO_TOKEN
    return m.Commit(handoff, wire.manifest_digest, first_token, wire.num_bytes, round=0)


def commit_answer_to_wire(answer: m.Ack | m.Incomplete | m.Refuse) -> pb.CommitResponse:
    match answer:
        case m.Refuse():
            return pb.CommitResponse(refusal=refusal_to_wire(answer.code, answer.reason))
        case m.Incomplete():
            refusal = refusal_to_wire(TransferCode.INCOMPLETE, f"{len(answer.missing)} blocks have not arrived")
            return pb.CommitResponse(refusal=refusal, missing=answer.missing)
        case m.Ack():
            return pb.CommitResponse()


def commit_answer_from_wire(wire: pb.CommitResponse, commit: m.Commit) -> m.Ack | m.Incomplete | m.Refuse:
    if not wire.HasField("refusal"):
        return m.Ack(commit.handoff)
    if wire.refusal.code == TransferCode.INCOMPLETE and wire.missing:
        return m.Incomplete(commit.handoff, commit.round, tuple(wire.missing))
    return _refuse(commit.handoff, wire.refusal)


def abort_to_wire(message: m.Abort) -> pb.AbortRequest:
    key, endpoints = _who(message.handoff)
    reason = message.reason[:_MAX_REASON_CHARS]
    return pb.AbortRequest(handoff=key, endpoints=endpoints, reason=reason, code=message.code.value)


def abort_from_wire(wire: pb.AbortRequest) -> m.Abort:
    handoff = handoff_from_wire(wire.handoff, wire.endpoints)
    return m.Abort(handoff, _code(wire.code), wire.reason[:_MAX_REASON_CHARS])


def fetch_to_wire(fetch: Fetch) -> pb.FetchRequest:
    key, endpoints = _who(fetch.handoff)
    return pb.FetchRequest(
        handoff=key,
        endpoints=endpoints,
        receiver_address=fetch.receiver_address,
        block_names=fetch.block_names,
        time_left_ms=max(1, min(_MAX_UINT32, round(fetch.time_left_s * 1e3))),
    )


def fetch_from_wire(wire: pb.FetchRequest) -> Fetch:
    _need(wire.time_left_ms > 0, "time_left_ms", "must not be 0")
    length = len(wire.receiver_address)
    _need(0 < length <= _MAX_ADDRESS_CHARS, "receiver_address", f"{length} characters, not 1 to {_MAX_ADDRESS_CHARS}")
    handoff = handoff_from_wire(wire.handoff, wire.endpoints)
    return Fetch(handoff, wire.receiver_address, tuple(wire.block_names), wire.time_left_ms / 1e3)


def fetch_answer_from_wire(wire: pb.FetchResponse, fetch: Fetch) -> int:
    """How many blocks will come. Raises TransferError where none will."""
    if wire.HasField("refusal"):
        raise refusal_from_wire(wire.refusal)
    most = len(fetch.block_names)
    _need(0 < wire.num_blocks <= most, "num_blocks", f"{wire.num_blocks}, not 1 to {most}")
    return wire.num_blocks


def _token_to_wire(token: m.FirstToken) -> common_pb2.Token:
    top = [common_pb2.Logprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs]
    return common_pb2.Token(token_id=token.token_id, logprob=token.logprob, top_logprobs=top)


def _token_from_wire(wire: common_pb2.Token) -> m.FirstToken:
    logprob = wire.logprob if wire.HasField("logprob") else None
    return m.FirstToken(wire.token_id, logprob, tuple((top.token_id, top.logprob) for top in wire.top_logprobs))
