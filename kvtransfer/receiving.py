"""The receiving side of a worker: takes blocks over from any number of senders."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import structlog

from baton.kvtransfer import messages as m
from baton.kvtransfer.canary import CanaryReceiver
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.errors import Fenced, Incompatible, RemoteProtocolError, TransferCode, TransferError
from baton.kvtransfer.expectations import Expectations
from baton.kvtransfer.handshake import Handshake, HandshakeReply, HeartbeatReply, choose_transport, choose_version
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.incoming import ReceiverHandoff, ReceiverHost
from baton.kvtransfer.layout import BLOCK_NAME_BYTES, mismatch
from baton.kvtransfer.reservations import OpenReservations
from baton.kvtransfer.transport.base import Arrival, detach
from baton.kvtransfer.transport.frames import Blocks, Header, parse_blocks
from baton.kvtransfer.transport.listener import IncomingPair, Inlet
from baton.kvtransfer.transport.stream import Payload
from baton.kvtransfer.versions import TIMELY_ANSWERS

_log = structlog.get_logger(__name__)

# Handoffs that ended and are kept to answer late messages: at 100 a second, those of the last ten seconds.
_MAX_ENDED = 1024
# Sender processes that were replaced and are remembered as stale.
_MAX_RETIRED = 1024


class ReceivingSide:
    """All handoffs that this worker receives. ``data_address`` is where its data plane is reached."""

    def __init__(self, context: AgentContext, host: ReceiverHost) -> None:
        self.data_address = ""
        self._context = context
        self._host = host
        options = context.options
        self._expectations = Expectations(options.expect_wait_s, options.max_waiting_reservations, context.clock)
        self._pairs: dict[WorkerIdentity, IncomingPair] = {}
        self._retired: OrderedDict[WorkerIdentity, None] = OrderedDict()
        self._shaking: dict[str, int] = {}  # handshakes under way, by worker: the number of the last one that began
        self._num_handshakes = 0
        self._handoffs: dict[bytes, ReceiverHandoff] = {}  # by fence; those that ended too, for a while
        self._ended: deque[bytes] = deque()
        self._reservations = OpenReservations(options.limits.lease_s)
        self._canaries = CanaryReceiver(context)
        self._is_closed = False

    @property
    def active(self) -> Sequence[ReceiverHandoff]:
        return [handoff for handoff in self._handoffs.values() if not handoff.is_over]

    @property
    def num_quarantined(self) -> int:
        """Slots that were given up and that a write can still land in."""
        return sum(handoff.num_quarantined for handoff in self.active)

    # What the host says.

    def expect(self, key: HandoffKey, sender: WorkerIdentity, deadline_s: float | None) -> None:
        self._expectations.expect(key, sender, deadline_s)

    def forget(self, key: HandoffKey) -> None:
        self._expectations.forget(key)
        for handoff in self.active:
            if handoff.id.key == key:
                handoff.feed(m.GiveUp("the receiver no longer wants it"))

    # What senders say on the control plane.

    async def handshake(self, theirs: Handshake) -> HandshakeReply:
        """Pairs with a sender process. Raises TransferError: Incompatible, naming both values of what differs, or Fenced."""
        ours = self._context
        self._check_sender(theirs)
        version = choose_version(theirs, ours.compatibility)
        if (difference := mismatch(ours.compatibility, theirs.compatibility)) is not None:
            raise Incompatible(difference)
        self._num_handshakes += 1
        number = self._shaking[theirs.sender.worker_id] = self._num_handshakes
        try:
            transport, source = await choose_transport(theirs, ours.transports)
        finally:
            is_latest = self._shaking.get(theirs.sender.worker_id) == number
            if is_latest:
                del self._shaking[theirs.sender.worker_id]
        try:
            # Attaching may have taken a while.
            self._check_sender(theirs)
            if not is_latest:
                raise TransferError(TransferCode.PEER_LOST, f"{theirs.sender.worker_id} shook hands again meanwhile")
        except TransferError:
            if source is not None:
                detach(transport, source)
            raise
        self._retire_others(theirs.sender)
        previous = self._pairs.get(theirs.sender)
        pair = IncomingPair(theirs.sender, ours.identity, transport, source, secrets.token_bytes(32), version)
        self._pairs[theirs.sender] = pair
        if previous is not None and theirs.keeps_handoffs:
            self._move_handoffs(previous, pair, theirs.failed)
        elif previous is not None:
            self._drop(previous, TransferCode.PEER_LOST, f"{theirs.sender} shook hands again")
        self.on_disconnected(pair)  # until it connects
        _log.info("kv_pair_made", sender=str(theirs.sender), transport=transport.name, version=version)
        return HandshakeReply(transport.name, self.data_address, pair.token, version)

    async def reserve(self, message: m.Reserve, within_s: float = 0.0) -> m.Grant | m.Refuse | None:
        """Answers when there are slots, or will be none; with ``within_s`` at least in that time, None for "still looking"."""
        if not within_s:
            return await self._look_for_slots(message)
        try:
            version = self._pair_of(message.handoff).version
            if version < TIMELY_ANSWERS:
                raise RemoteProtocolError(f"answer_within_ms between two that speak version {version}")
            return await self._reservations.ask(message.handoff.digest, lambda: self._look_for_slots(message), within_s)
        except TransferError as error:
            return self._refuse(message.handoff, error)

    async def _look_for_slots(self, message: m.Reserve) -> m.Grant | m.Refuse:
        handoff = self._handoffs.get(message.handoff.digest)
        try:
            pair = self._pair_of(message.handoff)
            if handoff is None:
                self._check_manifest(message, pair)
                self._check_quarantine()
                expectation = await self._expectations.wait_for(message.handoff)
                pair = self._pair_of(message.handoff)
                handoff = self._handoffs.get(message.handoff.digest)
                if handoff is None:
                    handoff = self._add(message.handoff, pair, expectation.deadline_s)
        except TransferError as error:
            return self._refuse(message.handoff, error)
        return await handoff.reserve(message)

    async def commit(self, message: m.Commit) -> m.Ack | m.Incomplete | m.Refuse:
        """Answers when the blocks are taken over, or will not be."""
        try:
            handoff = self._find(message.handoff)
        except TransferError as error:
            return self._refuse(message.handoff, error)
        return await handoff.commit(message)

    def abort(self, message: m.Abort) -> bool:
        """Whether the handoff was known. If it was not, it is now: its reservation will be refused."""
        try:
            pair = self._pair_of(message.handoff)
        except TransferError as error:
            self._context.stats.fenced += isinstance(error, Fenced)
            return False
        handoff = self._handoffs.get(message.handoff.digest)
        is_known = handoff is not None
        (handoff or self._add(message.handoff, pair, None)).feed(message)
        return is_known

    def heartbeat(self, sender: WorkerIdentity, receiver: WorkerIdentity, live: Iterable[HandoffKey]) -> HeartbeatReply:
        """Renews leases. Raises TransferError: Fenced when one of the two is not who it was."""
        self._check_receiver(receiver)
        if sender not in self._pairs:
            raise Fenced(f"no handshake with {sender}")
        unknown = set()
        for key in live:
            handoff = self._handoffs.get(HandoffId(key, sender, receiver).digest)
            if handoff is None or not handoff.renew(0.0):
                unknown.add(key)
        return HeartbeatReply(frozenset(unknown))

    # What senders say on the data plane.

    def find_pair(self, fence: bytes) -> IncomingPair | None:
        return next((pair for pair in self._pairs.values() if pair.fence == fence), None)

    def on_disconnected(self, pair: IncomingPair) -> None:
        """Keeps a pair that may come back within a lease; a sender that died must not keep its memory mapped here."""
        if not pair.is_closed and not self._is_closed:
            if pair.expiry is not None:
                pair.expiry.cancel()
            lease_s = self._context.options.limits.lease_s
            pair.expiry = asyncio.get_running_loop().call_later(lease_s, self._drop_if_gone, pair)

    def on_push(self, inlet: Inlet, pair: IncomingPair, header: Header, body: memoryview) -> Payload | None:
        handoff = self._handoffs.get(header.fence)
        if handoff is not None and handoff.pair is not pair:
            handoff = None
        try:
            blocks = self._parse(pair, body)
            if header.fence == pair.fence:
                return self._canaries.push(inlet, pair, header, blocks)
            if handoff is not None:
                return handoff.push(inlet, header.token, blocks)
        except Fenced as error:
            self._context.stats.fenced += 1
            raise RemoteProtocolError(error.message, TransferCode.STALE) from error
        except RemoteProtocolError as error:
            if handoff is not None:
                handoff.feed(m.GiveUp(error.message, TransferCode.PROTOCOL))
            raise
        self._context.stats.fenced += 1
        inlet.send_gone(header.fence, TransferCode.UNKNOWN_HANDOFF, "no such handoff here")
        return pair.transport.land(Arrival(header.fence, blocks, set(), pair.source, inlet.resume, lambda landed: None))

    def _parse(self, pair: IncomingPair, body: memoryview) -> Blocks:
        blocks = parse_blocks(body, self._context.memory.block_bytes)
        if pair.source is not None and max(blocks.source_rows) >= pair.source.num_rows:
            raise RemoteProtocolError("a block outside the memory that was shared")
        return blocks

    # Life.

    def tick(self) -> None:
        for handoff in self.active:
            handoff.tick()

    async def close(self) -> None:
        """Gives up what is under way and waits until every slot is released."""
        self._is_closed = True
        for handoff in self.active:
            handoff.feed(m.GiveUp("the receiver is shutting down", TransferCode.DRAINING))
        for transport in self._context.transports.values():
            await transport.close()
        await self._canaries.close()
        await self._reservations.close()
        for handoff in list(self._handoffs.values()):
            await handoff.settle()
        for pair in self._pairs.values():
            pair.close()
        self._pairs.clear()

    def _add(self, handoff: HandoffId, pair: IncomingPair, deadline_s: float | None) -> ReceiverHandoff:
        token = secrets.token_bytes(32)
        added = ReceiverHandoff(
            handoff, pair, self._context, self._host, token=token, deadline_s=deadline_s, ended=self._on_ended
        )
        self._handoffs[handoff.digest] = added
        return added

    def _on_ended(self, handoff: ReceiverHandoff) -> None:
        self._expectations.forget(handoff.id.key)
        self._ended.append(handoff.id.digest)
        while len(self._ended) > _MAX_ENDED:
            del self._handoffs[self._ended.popleft()]
        if handoff.error is None:
            self._context.stats.handoffs_received += 1
        else:
            self._context.stats.failures[handoff.error.code.value] += 1
            _log.info("kv_handoff_failed", handoff=str(handoff.id), side="receiver", reason=str(handoff.error))

    def _check_sender(self, theirs: Handshake) -> None:
        self._check_receiver(theirs.receiver)
        if theirs.sender in self._retired:
            raise Fenced(f"{theirs.sender} was replaced by a newer process")

    def _check_receiver(self, receiver: WorkerIdentity) -> None:
        if receiver != self._context.identity:
            raise Fenced(f"meant for {receiver}, this is {self._context.identity}")
        if self._is_closed:
            raise TransferError(TransferCode.DRAINING, f"{receiver} is shutting down")

    def _pair_of(self, handoff: HandoffId) -> IncomingPair:
        self._check_receiver(handoff.receiver)
        pair = self._pairs.get(handoff.sender)
        if pair is None:
            raise Fenced(f"no handshake with {handoff.sender}")
        return pair

    def _find(self, handoff: HandoffId) -> ReceiverHandoff:
        self._pair_of(handoff)
        found = self._handoffs.get(handoff.digest)
        if found is None:
            self._context.stats.fenced += 1
            raise TransferError(TransferCode.UNKNOWN_HANDOFF, f"no handoff {handoff.key} from {handoff.sender}")
        return found

    def _check_manifest(self, message: m.Reserve, pair: IncomingPair) -> None:
        layout, names = self._context.compatibility.layout, message.block_names
        if not set(map(len, names)) <= {BLOCK_NAME_BYTES}:
            raise RemoteProtocolError(f"a block name that has not {BLOCK_NAME_BYTES} bytes")
        if not names or len(names) != layout.num_blocks(message.num_tokens):
            raise RemoteProtocolError(f"{message.num_tokens} tokens in {len(names)} blocks of {layout.block_size}")
        if message.transport not in self._context.transports:  # the pair may have gone on by another one meanwhile
            raise RemoteProtocolError(f"transport {message.transport!r}; the handshake chose {pair.transport.name!r}")

    def _check_quarantine(self) -> None:
        limit, count = self._context.options.max_num_quarantined, self.num_quarantined
        if limit is not None and count > limit:
            raise TransferError(
                TransferCode.NO_CAPACITY,
                f"{count} slots are in quarantine, at most {limit} may be; nothing new until then",
            )

    def _refuse(self, handoff: HandoffId, error: TransferError) -> m.Refuse:
        self._context.stats.fenced += isinstance(error, Fenced)
        return m.Refuse(handoff, error.code, error.message)

    def _retire_others(self, sender: WorkerIdentity) -> None:
        """Whatever ran as the same worker before is stale from now on."""
        for other in [other for other in self._pairs if other.worker_id == sender.worker_id and other != sender]:
            self._drop(self._pairs.pop(other), TransferCode.STALE, f"{other} was replaced by {sender}")
            self._retired[other] = None
            while len(self._retired) > _MAX_RETIRED:
                self._retired.popitem(last=False)

    def _move_handoffs(self, previous: IncomingPair, pair: IncomingPair, failed: Sequence[str]) -> None:
        """The sender goes on by another transport: what was landing by the old one is cut short, and comes again."""
        for handoff in self.active:
            if handoff.pair is previous:
                handoff.move(pair, failed)
        previous.close()

    def _drop_if_gone(self, pair: IncomingPair) -> None:
        if pair.is_closed or pair.inlets:
            return
        if any(handoff.pair is pair for handoff in self.active):
            self.on_disconnected(pair)  # their leases run out first
            return
        del self._pairs[pair.sender]
        pair.close()
        _log.info("kv_pair_dropped", sender=str(pair.sender))

    def _drop(self, pair: IncomingPair, code: TransferCode, reason: str) -> None:
        for handoff in self.active:
            if handoff.pair is pair:
                handoff.feed(m.PeerLost(reason, code))
        pair.close()
