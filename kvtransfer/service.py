"""The control plane over gRPC: a servicer in front of an agent, and a client for a peer's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.api.kvtransfer.v1 import kvtransfer_pb2_grpc as pb_grpc
from baton.kvtransfer import messages as m
from baton.kvtransfer import wire
from baton.kvtransfer.canary import LinkReport
from baton.kvtransfer.errors import Fenced, RemoteProtocolError, TransferCode, TransferError, Unanswered
from baton.kvtransfer.fetch import Fetch
from baton.kvtransfer.fetching import FetchDesk
from baton.kvtransfer.handshake import Handshake, HandshakeReply, HeartbeatReply
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.receiving import ReceivingSide
from baton.kvtransfer.versions import TIMELY_ANSWERS, WIRE_VERSIONS

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")
Parsed = TypeVar("Parsed")
Probe = Callable[[WorkerIdentity, str], Awaitable[LinkReport]]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["KVTransferService"].full_name

# What is said of a malformed request: it may quote a field of any length, and gRPC drops answers with more than 8 KiB of it,
# each character counted as up to 12.
_MAX_DETAIL_CHARS = 500
# The answer to a reservation or a commit comes when the machine that gave it up says so; the call only backs that up.
_GRACE_S = 2.0


class KVTransferServicer(pb_grpc.KVTransferServiceServicer):
    """Serves what senders ask of a receiving side, and receivers of a holder. Malformed requests get INVALID_ARGUMENT,
    naming the field."""

    def __init__(self, receiving: ReceivingSide, desk: FetchDesk, identity: WorkerIdentity, probe: Probe) -> None:
        self._receiving = receiving
        self._desk = desk
        self._identity = identity
        self._probe = probe

    async def Handshake(self, request: pb.HandshakeRequest, context: Context) -> pb.HandshakeResponse:
        handshake = await _parse(wire.handshake_from_wire, request, context)
        try:
            reply = await self._receiving.handshake(handshake)
        except TransferError as error:
            receiver = wire.identity_to_wire(self._identity)
            return pb.HandshakeResponse(refusal=wire.refusal_to_wire(error.code, error.message), receiver=receiver)
        return wire.handshake_reply_to_wire(reply, self._identity)

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        await _parse(wire.check_known, request, context)
        message = await _parse(wire.reserve_from_wire, request, context)
        answer = await self._receiving.reserve(message, request.answer_within_ms / 1e3)
        return wire.reserve_answer_to_wire(answer)

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        await _parse(wire.check_known, request, context)
        message = await _parse(wire.commit_from_wire, request, context)
        return wire.commit_answer_to_wire(await self._receiving.commit(message))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        await _parse(wire.check_known, request, context)
        message = await _parse(wire.abort_from_wire, request, context)
        return pb.AbortResponse(known=self._receiving.abort(message))

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        await _parse(wire.check_known, request, context)
        sender, receiver = await _parse(wire.endpoints_from_wire, request.endpoints, context)
        live = await _parse(lambda keys: [wire.key_from_wire(key) for key in keys], request.live, context)
        try:
            reply = self._receiving.heartbeat(sender, receiver, live)
        except TransferError as error:
            return pb.HeartbeatResponse(refusal=wire.refusal_to_wire(error.code, error.message))
        return pb.HeartbeatResponse(unknown=[wire.key_to_wire(key) for key in reply.unknown])

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> pb.FetchResponse:
        fetch = await _parse(wire.fetch_from_wire, request, context)
        try:
            return pb.FetchResponse(num_blocks=await self._desk.serve(fetch))
        except TransferError as error:
            return pb.FetchResponse(refusal=wire.refusal_to_wire(error.code, error.message))

    async def Probe(self, request: pb.ProbeRequest, context: Context) -> pb.ProbeResponse:
        sender, receiver, address = await _parse(wire.probe_from_wire, request, context)
        try:
            if sender != self._identity:
                raise Fenced(f"meant for {sender}, this is {self._identity}")
            report = await self._probe(receiver, address)
        except TransferError as error:
            return pb.ProbeResponse(refusal=wire.refusal_to_wire(error.code, error.message))
        return pb.ProbeResponse(
            transport=report.transport,
            verified=report.is_verified,
            rtt_ms=report.rtt_ms,
            gb_per_s=report.gb_per_s,
            failed=report.failed,
        )


def add_to_server(
    server: grpc.aio.Server, receiving: ReceivingSide, desk: FetchDesk, identity: WorkerIdentity, probe: Probe
) -> None:
    """Registers the service, before ``server`` starts."""
    servicer = KVTransferServicer(receiving, desk, identity, probe)
    pb_grpc.add_KVTransferServiceServicer_to_server(servicer, server)


def open_local_channel(address: str) -> grpc.aio.Channel:
    """A plain channel to a peer. It shares no connection and no back-off with others: a restarted peer is reached at once."""
    return grpc.aio.insecure_channel(
        address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    )


async def _parse(parse: Callable[[Request], Parsed], request: Request, context: Context) -> Parsed:
    try:
        return parse(request)
    except ValueError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error)[:_MAX_DETAIL_CHARS])
        raise  # abort raises; this is for the type checker


class KVTransferClient:
    """Asks one peer. Owns ``channel``. Implements PeerClient."""

    def __init__(
        self, channel: grpc.aio.Channel, address: str, *, timeout_s: float, reserve_answer_s: float = 1.0
    ) -> None:
        self._channel = channel
        self._address = address
        self._timeout_s = timeout_s
        self._reserve_answer_s = reserve_answer_s
        self._stub = pb_grpc.KVTransferServiceStub(channel)

    async def handshake(self, handshake: Handshake) -> HandshakeReply:
        response = await self._call(self._stub.Handshake, wire.handshake_to_wire(handshake), self._timeout_s)
        if response.HasField("refusal"):
            raise wire.refusal_from_wire(response.refusal)
        return self._read(wire.handshake_reply_from_wire, response)

    async def reserve(
        self, message: m.Reserve, timeout_s: float, version: int = WIRE_VERSIONS.oldest
    ) -> m.Grant | m.Refuse:
        request = wire.reserve_to_wire(message)
        if version < TIMELY_ANSWERS:
            response = await self._call(self._stub.Reserve, request, timeout_s + _GRACE_S)
            return self._read_known(lambda answer: wire.reserve_answer_from_wire(answer, message.handoff), response)
        request.answer_within_ms = max(1, round(self._reserve_answer_s * 1e3))
        while True:
            # At the earliest: a peer that is still looking sooner than it was asked to say so is not asked in a circle.
            again_s = asyncio.get_running_loop().time() + self._reserve_answer_s
            response = await self._call(self._stub.Reserve, request, self._reserve_answer_s + self._timeout_s)
            if response.WhichOneof("outcome") != "waiting":
                return self._read_known(lambda answer: wire.reserve_answer_from_wire(answer, message.handoff), response)
            await asyncio.sleep(again_s - asyncio.get_running_loop().time())

    async def commit(self, message: m.Commit, timeout_s: float) -> m.Ack | m.Incomplete | m.Refuse:
        response = await self._call(self._stub.Commit, wire.commit_to_wire(message), timeout_s + _GRACE_S)
        return self._read_known(lambda answer: wire.commit_answer_from_wire(answer, message), response)

    async def abort(self, message: m.Abort) -> None:
        await self._call(self._stub.Abort, wire.abort_to_wire(message), self._timeout_s)

    async def heartbeat(
        self, sender: WorkerIdentity, receiver: WorkerIdentity, live: Sequence[HandoffKey]
    ) -> HeartbeatReply:
        request = pb.HeartbeatRequest(
            endpoints=wire.endpoints_to_wire(sender, receiver), live=[wire.key_to_wire(key) for key in live]
        )
        response = await self._call(self._stub.Heartbeat, request, self._timeout_s)
        if response.HasField("refusal"):
            raise wire.refusal_from_wire(response.refusal)
        return HeartbeatReply(
            self._read_known(lambda answer: frozenset(map(wire.key_from_wire, answer.unknown)), response)
        )

    async def fetch(self, fetch: Fetch) -> int:
        timeout_s = min(self._timeout_s, fetch.time_left_s)
        response = await self._call(self._stub.Fetch, wire.fetch_to_wire(fetch), timeout_s)
        return self._read(lambda answer: wire.fetch_answer_from_wire(answer, fetch), response)

    async def close(self) -> None:
        await self._channel.close(None)

    async def _call(self, method: Callable[..., Awaitable[Response]], request: object, timeout_s: float) -> Response:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            why = f"{self._address} answered {error.code().name}: {error.details()}"
            is_ours = error.code() is grpc.StatusCode.INVALID_ARGUMENT
            raise (TransferError(TransferCode.PROTOCOL, why) if is_ours else Unanswered(why)) from error
        except grpc.aio.UsageError as error:
            raise Unanswered(f"the channel to {self._address} is closed") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled us: so gRPC ends the calls of a channel that is closed.
            raise Unanswered(f"the channel to {self._address} was closed") from error

    def _read_known(self, parse: Callable[[Any], Parsed], response: Message) -> Parsed:
        """What is said in a pair, whose version says which fields there are."""
        self._read(wire.check_known, response)
        return self._read(parse, response)

    def _read(self, parse: Callable[[Response], Parsed], response: Response) -> Parsed:
        try:
            return parse(response)
        except ValueError as error:
            raise RemoteProtocolError(f"{self._address} answered nonsense: {error}") from error
