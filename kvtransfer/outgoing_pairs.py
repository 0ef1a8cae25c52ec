"""The receivers that a worker hands blocks to: a handshake, a control channel, a data connection and a heartbeat for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

import structlog

from baton.kvtransfer import failpoint
from baton.kvtransfer import messages as m
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.errors import RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.handshake import Handshake, HandshakeReply, PeerClient
from baton.kvtransfer.identity import HandoffId, WorkerIdentity, pair_digest
from baton.kvtransfer.mapping import SharedMemory, host_id
from baton.kvtransfer.transport.base import Offer, Transport
from baton.kvtransfer.transport.outlet import Outlet

_log = structlog.get_logger(__name__)


class PairedHandoff(Protocol):
    """A handoff as its pair sees it."""

    id: HandoffId

    @property
    def holds_lease(self) -> bool:
        """The receiver has granted, and waits to hear that the handoff is alive."""
        ...

    def feed(self, event: m.Event) -> None: ...


class OutgoingPair:
    """One receiver process. Passes on what is heard of its handoffs, and renews their leases."""

    def __init__(
        self,
        context: AgentContext,
        receiver: WorkerIdentity,
        client: PeerClient,
        reply: HandshakeReply,
        discard: Callable[[OutgoingPair], None],
    ) -> None:
        if reply.transport not in context.transports:
            raise RemoteProtocolError(f"{receiver} chose transport {reply.transport!r}, which was not offered")
        self.receiver = receiver
        self.client = client
        self.transport = context.transports[reply.transport]
        self.is_closed = False
        self.outlet = Outlet(
            _split_address(reply.data_address),
            pair_fence=pair_digest(context.identity, receiver),
            data_token=reply.data_token,
            transport=self.transport,
            memory=context.memory,
            executor=context.executor,
            events=self,
            options=context.options,
            sockets=context.sockets,
        )
        self._context = context
        self._discard = discard
        self._handoffs: dict[bytes, PairedHandoff] = {}
        self._heart: asyncio.Task[None] | None = None

    def add(self, handoff: PairedHandoff) -> None:
        """From now on the handoff hears what concerns it, and its lease is renewed while it holds one."""
        self._handoffs[handoff.id.digest] = handoff
        if self._heart is None:
            self._heart = asyncio.create_task(self._beat(), name="kv-heartbeat")

    def remove(self, handoff: PairedHandoff) -> None:
        self._handoffs.pop(handoff.id.digest, None)

    def lose(self, code: TransferCode, reason: str) -> None:
        """The receiver is gone: every handoff with it ends."""
        for handoff in list(self._handoffs.values()):
            handoff.feed(m.PeerLost(reason, code))

    def discard(self) -> None:
        """Makes way for a new handshake."""
        if not self.is_closed:
            self.is_closed = True
            self._discard(self)

    async def close(self) -> None:
        self.is_closed = True
        self.lose(TransferCode.PEER_LOST, f"no longer connected to {self.receiver}")
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.wait([self._heart])
        await self.outlet.close()
        await self.client.close()

    # What the outlet reports.

    def on_sent(self, fence: bytes, blocks: tuple[tuple[int, int], ...]) -> None:
        self._context.stats.bytes_sent[self.transport.name] += len(blocks) * self._context.memory.block_bytes
        if (handoff := self._handoffs.get(fence)) is not None:
            handoff.feed(m.BlocksSent(blocks))

    def on_verdicts(self, fence: bytes, landed: tuple[int, ...], corrupt: tuple[int, ...]) -> None:
        if (handoff := self._handoffs.get(fence)) is not None:
            handoff.feed(m.Verdicts(handoff.id, landed, corrupt))

    def on_gone(self, fence: bytes, code: TransferCode, reason: str) -> None:
        if (handoff := self._handoffs.get(fence)) is not None:
            handoff.feed(m.Refuse(handoff.id, code, reason))

    def on_link_lost(self, reason: str) -> None:
        _log.info("kv_link_lost", receiver=str(self.receiver), reason=reason)
        if not self._handoffs:
            self.discard()  # perhaps it will never be needed again; else a handshake costs little
        for handoff in list(self._handoffs.values()):
            if handoff.holds_lease:
                handoff.feed(m.LinkLost(reason))

    def on_unreachable(self, code: TransferCode, reason: str) -> None:
        _log.warning("kv_peer_unreachable", receiver=str(self.receiver), reason=reason)
        for handoff in list(self._handoffs.values()):
            if handoff.holds_lease:
                handoff.feed(m.PeerLost(reason, code))
        if code is TransferCode.STALE or not self._handoffs:
            self.discard()

    async def _beat(self) -> None:
        try:
            while self._handoffs:
                await asyncio.sleep(self._context.options.heartbeat_s)
                await self._renew([handoff for handoff in self._handoffs.values() if handoff.holds_lease])
        finally:
            self._heart = None

    async def _renew(self, live: list[PairedHandoff]) -> None:
        if not live:
            return
        sent_s = self._context.clock()
        keys = [handoff.id.key for handoff in live]
        try:
            await failpoint.reach_async("lease.renew")
            reply = await self.client.heartbeat(self._context.identity, self.receiver, keys)
        except TransferError as error:
            _log.warning("kv_heartbeat_failed", receiver=str(self.receiver), reason=error.message)
            if error.code is TransferCode.STALE:
                self.lose(error.code, error.message)
                self.discard()
            return  # otherwise the leases decide
        for handoff in live:
            if not handoff.holds_lease:
                continue
            if handoff.id.key in reply.unknown:
                reason = f"{self.receiver} no longer knows this handoff"
                handoff.feed(m.Refuse(handoff.id, TransferCode.UNKNOWN_HANDOFF, reason))
            else:
                handoff.feed(m.Renewed(handoff.id, sent_s))


class OutgoingPairs:
    """Pairs by receiver process, made when first needed. A failed handshake is not remembered."""

    def __init__(self, context: AgentContext) -> None:
        self._context = context
        self._pairs: dict[WorkerIdentity, asyncio.Task[OutgoingPair]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def get(self, receiver: WorkerIdentity, address: str) -> OutgoingPair:
        """The pair with ``receiver``, whose gRPC services are at ``address``. Raises TransferError."""
        task = self._pairs.get(receiver)
        if task is None or _is_spent(task):
            task = asyncio.create_task(self._make(receiver, address), name="kv-handshake")
            self._pairs[receiver] = task
        return await asyncio.shield(task)

    async def _make(self, receiver: WorkerIdentity, address: str) -> OutgoingPair:
        context = self._context
        client = context.connect(address)
        try:
            ours = Handshake(
                context.identity,
                receiver,
                context.compatibility,
                tuple(context.transports),
                _offer(context.transports.values()),
            )
            pair = OutgoingPair(context, receiver, client, await client.handshake(ours), self._discard)
            # At once: an address that cannot be reached is found out before anybody waits for blocks.
            await pair.outlet.connect()
        except BaseException:
            await client.close()
            raise
        _log.info("kv_pair_made", receiver=str(receiver), transport=pair.transport.name)
        self._retire_others(receiver)
        return pair

    def _retire_others(self, receiver: WorkerIdentity) -> None:
        """Forgets whatever ran as the same worker before: the new process has just answered."""
        for other in list(self._pairs):
            if other.worker_id == receiver.worker_id and other != receiver:
                task = self._pairs.pop(other)
                if task.done() and not _is_spent(task):
                    task.result().lose(TransferCode.STALE, f"{other} was replaced by {receiver}")
                    task.result().discard()

    def _discard(self, pair: OutgoingPair) -> None:
        task = self._pairs.get(pair.receiver)
        if (
            task is not None
            and task.done()
            and not task.cancelled()
            and task.exception() is None
            and task.result() is pair
        ):
            del self._pairs[pair.receiver]
        closing = asyncio.create_task(pair.close(), name="kv-pair-close")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for task in self._pairs.values():
            if not task.done():
                task.cancel()
        tasks = list(self._pairs.values())
        self._pairs.clear()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, OutgoingPair):
                await result.close()
        if self._closing:
            await asyncio.wait(self._closing)


def _is_spent(task: asyncio.Task[OutgoingPair]) -> bool:
    """It failed, or what it made is closed."""
    return task.done() and (task.cancelled() or task.exception() is not None or task.result().is_closed)


def _offer(transports: Iterable[Transport]) -> Offer:
    """What the receiver must know for each of the transports."""
    offers = {transport.name: transport.offer() for transport in transports}
    shared = next((offer for offer in offers.values() if isinstance(offer, SharedMemory)), None)
    return Offer(host_id(), shared, {name: offer for name, offer in offers.items() if isinstance(offer, bytes)})


def _split_address(address: str) -> tuple[str, int]:
    """``host:port``, the host perhaps in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise RemoteProtocolError(f"data address {address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
