"""A sender that speaks the control plane properly and the data plane as a test wants: any bytes at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import xxhash
from helpers.kv_agents import COMPATIBILITY, FIRST_TOKEN, LAYOUT, Node

from baton.kvtransfer import messages as m
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.handshake import Handshake, HandshakeReply
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity, manifest_digest, pair_digest
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.service import SERVICE_NAME, KVTransferClient, open_local_channel
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.transport.frames import BlockEntry, FrameKind

BLOCK = LAYOUT.block_bytes


@dataclass
class Connection:
    """One data-plane connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def next_frame(self) -> tuple[FrameKind, bytes, bytes] | None:
        """Kind, fence and body of the next frame; None when the receiver has closed the connection."""
        try:
            async with asyncio.timeout(10):
                header = frames.parse_header(await self.reader.readexactly(frames.HEADER_BYTES))
                return header.kind, header.fence, await self.reader.readexactly(header.body_bytes)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def until_closed(self) -> list[FrameKind]:
        """Reads to the end: the kinds of the frames that came."""
        kinds = []
        while (frame := await self.next_frame()) is not None:
            kinds.append(frame[0])
        return kinds

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


class RawPeer:
    """Handshake, reservation and commit by the book; frames by hand."""

    def __init__(self, node: Node, client: KVTransferClient, identity: WorkerIdentity) -> None:
        self.node = node
        self.client = client
        self.identity = identity
        self.reply: HandshakeReply
        self.connections: list[Connection] = []

    @property
    def pair_fence(self) -> bytes:
        return pair_digest(self.identity, self.node.identity)

    def handoff(self, request_id: str = "raw", attempt: int = 1) -> HandoffId:
        return HandoffId(HandoffKey(request_id, attempt), self.identity, self.node.identity)

    async def shake_hands(self, transport: str = "tcp", offer: Offer | None = None) -> HandshakeReply:
        offer = offer or Offer(host_id(), None)
        ours = Handshake(self.identity, self.node.identity, COMPATIBILITY, (transport,), offer)
        self.reply = await self.client.handshake(ours)
        return self.reply

    async def reserve(self, handoff: HandoffId, names: Sequence[bytes]) -> m.Grant:
        """Announced to the receiver and granted."""
        self.node.agent.expect(handoff.key, self.identity)
        message = m.Reserve(handoff, tuple(names), len(names) * LAYOUT.block_size, self.reply.transport)
        answer = await self.client.reserve(message, 10.0)
        assert isinstance(answer, m.Grant)
        return answer

    async def connect(self, *, hello: bytes | None = None) -> Connection:
        host, port = self.reply.data_address.split(":")
        connection = Connection(*await asyncio.open_connection(host, int(port)))
        self.connections.append(connection)
        if hello is None:
            hello = frames.pack_hello(pair_digest(self.identity, self.node.identity), self.reply.data_token)
        if hello:
            await connection.send(hello)
        return connection

    async def commit(
        self, handoff: HandoffId, blocks: dict[int, bytes], names: Sequence[bytes], round_: int = 1
    ) -> m.PeerMessage:
        digest = manifest_digest((index, names[index], checksum(data)) for index, data in sorted(blocks.items()))
        return await self.client.commit(m.Commit(handoff, digest, FIRST_TOKEN, 0, round_), 10.0)

    async def abort(self, handoff: HandoffId) -> None:
        await self.client.abort(m.Abort(handoff, TransferCode.ABORTED, "a test"))


def checksum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def blocks_frame(
    handoff: HandoffId, grant: m.Grant, data: dict[int, bytes], *, token: bytes | None = None, **slot_changes: int
) -> bytes:
    """A BLOCKS frame for these indices of the grant, whole; ``slot_changes`` spoil every slot in it."""
    slots = {slot.index: slot for slot in grant.slots}
    entries = [
        BlockEntry(slots.get(index, m.Slot(index, 0, 0))._replace(**slot_changes), checksum(block), 0)
        for index, block in data.items()
    ]
    head = frames.pack_blocks(FrameKind.BLOCKS, handoff.digest, token or grant.token, entries, BLOCK)
    return head + b"".join(data.values())


@asynccontextmanager
async def raw_peer(node: Node, worker_id: str = "prefill-raw", incarnation: str = "9" * 32) -> AsyncIterator[RawPeer]:
    channel = open_local_channel(node.address)
    peer = RawPeer(node, KVTransferClient(channel, node.address, timeout_s=5.0), WorkerIdentity(worker_id, incarnation))
    try:
        yield peer
    finally:
        for connection in peer.connections:
            await connection.close()
        await peer.client.close()


@asynccontextmanager
async def scripted_receiver(
    answer: Callable[[bytes, Any], Awaitable[bytes]], **client_options: float
) -> AsyncIterator[KVTransferClient]:
    """A peer whose every answer to a reservation is the test's own bytes, and a client that asks it."""
    server = grpc.aio.server()
    handlers = {"Reserve": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    client = KVTransferClient(open_local_channel(address), address, **({"timeout_s": 30.0} | client_options))
    try:
        yield client
    finally:
        await client.close()
        await server.stop(None)
