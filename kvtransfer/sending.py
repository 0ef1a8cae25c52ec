"""The sending side of a worker: hands blocks over to any number of receivers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from baton.kvtransfer import failpoint
from baton.kvtransfer import messages as m
from baton.kvtransfer.canary import LinkReport
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.driver import Driver
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.outgoing_pair import OutgoingPair
from baton.kvtransfer.outgoing_pairs import OutgoingPairs
from baton.kvtransfer.sender import Sender

_log = structlog.get_logger(__name__)

# A commit may be asked again: the answer is the same. These are the pauses before it is, where the receiver could not be asked.
_COMMIT_RETRY_PAUSES_S = (0.1, 0.4)


@dataclass(frozen=True, slots=True)
class HandoffSpec:
    """What to hand over, and to whom.

    ``block_names`` are those of the whole prompt of ``num_tokens`` tokens. ``deadline_s``, on the agent's clock, is when the
    request is worth nothing. ``on_done`` is called exactly once, on the event loop, when the blocks may be released:
    with None when the receiver took over, else with the reason.
    """

    request_id: str
    attempt: int
    receiver: WorkerIdentity
    receiver_address: str  # host:port of its gRPC services
    block_names: Sequence[bytes]
    num_tokens: int
    deadline_s: float | None = None
    on_done: Callable[[TransferError | None], None] | None = None


class SenderHandoff:
    """One handoff under way. All methods belong to the event loop; ``blocks_ready`` does not wait for anything."""

    def __init__(self, spec: HandoffSpec, context: AgentContext, side: SendingSide) -> None:
        key = HandoffKey(spec.request_id, spec.attempt)
        self.id = HandoffId(key, context.identity, spec.receiver)
        self._spec = spec
        self._side = side
        self._machine = Sender(
            self.id,
            spec.block_names,
            spec.num_tokens,
            block_bytes=context.memory.block_bytes,
            limits=context.options.limits,
            deadline_s=spec.deadline_s,
        )
        self._driver = Driver(self._machine, self._perform, context.clock)
        self._pair: OutgoingPair | None = None
        self._block_ids: dict[int, int] = {}
        self._fallbacks: tuple[str, ...] = ()
        self._calls: set[asyncio.Task[None]] = set()
        self._done: asyncio.Future[m.Done] = asyncio.get_running_loop().create_future()

    @property
    def holds_lease(self) -> bool:
        return self._machine.holds_lease

    @property
    def is_over(self) -> bool:
        """The blocks are released."""
        return self._done.done()

    def blocks_ready(self, blocks: Mapping[int, int]) -> None:
        """These blocks, index in the prompt to block id here, are computed and will not change. They are pushed at once.

        After the handoff failed this does nothing. Raises LocalProtocolError for an index that the prompt does not have.
        """
        if not self.is_over:
            self._block_ids.update(blocks)
            self.feed(m.BlocksReady(tuple(blocks)))

    async def commit(self, first_token: m.FirstToken) -> m.TransferReport:
        """All blocks are ready: waits until the receiver has taken over. Raises TransferError when it did not.

        Cancelling the wait gives the handoff up. Raises LocalProtocolError when a block is not ready.
        """
        if not self.is_over:
            self.feed(m.Finish(first_token))
        try:
            done = await asyncio.shield(self._done)
        except asyncio.CancelledError:
            self._give_up("the sender stopped waiting for the commit")
            raise
        if done.error is not None:
            raise done.error
        assert done.report is not None
        return dataclasses.replace(done.report, transport=self._linked.transport.name, fallbacks=self._fallbacks)

    async def abort(self, reason: str) -> None:
        """Gives the handoff up and waits until the blocks are released. The receiver is told. Idempotent."""
        self._give_up(reason)
        await asyncio.shield(self._done)

    async def wait(self) -> TransferError | None:
        """Waits for the end: None when the receiver took over, else the reason."""
        return (await asyncio.shield(self._done)).error

    def fell_back(self, failed: Sequence[str]) -> None:
        self._fallbacks += tuple(failed)

    def feed(self, event: m.Event) -> None:
        self._driver.feed(event)

    def tick(self) -> None:
        self._driver.tick()

    def _give_up(self, reason: str) -> None:
        if not self.is_over:
            self.feed(m.GiveUp(reason))

    async def open(self, pairs: OutgoingPairs) -> None:
        """Shakes hands if need be, then reserves."""
        try:
            while (pair := await pairs.get(self._spec.receiver, self._spec.receiver_address)).is_closed:
                pass  # it was closed before we came to use it
        except TransferError as error:
            self.feed(m.GiveUp(error.message, error.code))
            return
        except Exception as error:  # whatever it was, those who wait for this handoff are told
            _log.exception("kv_pairing_failed", handoff=str(self.id))
            self.feed(m.GiveUp(f"pairing with the receiver failed: {error!r}", TransferCode.INTERNAL))
            return
        if not self.is_over:
            self._pair = pair
            pair.add(self)
            self.feed(m.Open(pair.transport.name))

    def _perform(self, command: m.Command) -> None:
        match command:
            case m.Send(m.Abort() as message):
                self._side.tell(self._pair, message)
            case m.Send(m.Reserve() as message):
                self._call(self._reserve(message))
            case m.Send(m.Commit() as message):
                self._call(self._commit(message))
            case m.PushBlocks(slots, token):
                block_ids = self._block_ids
                self._linked.push(self.id.digest, token, [(slot, block_ids[slot.index]) for slot in slots])
            case m.StopPushing():
                self._linked.cancel(self.id.digest, lambda: self.feed(m.Quiet()))
            case m.Done():
                self._end(command)

    @property
    def _linked(self) -> OutgoingPair:
        assert self._pair is not None
        return self._pair

    def _call(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._end_call)

    def _end_call(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("kv_call_failed", handoff=str(self.id), exc_info=error)
            self.feed(m.GiveUp(f"asking the receiver failed: {error!r}", TransferCode.INTERNAL))

    async def _reserve(self, message: m.Reserve) -> None:
        try:
            pair, limit_s = self._linked, self._machine.limits.reserve_timeout_s
            answer = await pair.client.reserve(message, limit_s, pair.version)
        except TransferError as error:
            self.feed(m.PeerLost(error.message, error.code))
        else:
            self.feed(answer)

    async def _commit(self, message: m.Commit) -> None:
        for pause_s in (*_COMMIT_RETRY_PAUSES_S, None):
            try:
                await failpoint.reach_async("kv.commit.before")
                answer = await self._linked.client.commit(message, self._machine.limits.ack_timeout_s)
            except TransferError as error:
                if pause_s is None or error.code is not TransferCode.PEER_LOST:
                    self.feed(m.PeerLost(error.message, error.code))
                    return
                await asyncio.sleep(pause_s)
            else:
                if isinstance(answer, m.Incomplete):
                    # It answers this commit, whatever number the receiver knows it by.
                    answer = dataclasses.replace(answer, round=message.round)
                    self._linked.doubt(self.id.digest)  # first, so that the same blocks are not lost twice
                self.feed(answer)
                return

    def _end(self, done: m.Done) -> None:
        for call in self._calls:
            call.cancel()
        if self._pair is not None:
            self._pair.remove(self)
            if done.error is not None and done.error.code is TransferCode.STALE:
                self._pair.discard()
        self._side.ended(self, done.error)
        self._done.set_result(done)
        if self._spec.on_done is not None:
            self._spec.on_done(done.error)


class SendingSide:
    """All handoffs that this worker sends."""

    def __init__(self, context: AgentContext) -> None:
        self._context = context
        self._pairs = OutgoingPairs(context)
        self._handoffs: dict[HandoffId, SenderHandoff] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, spec: HandoffSpec) -> SenderHandoff:
        """Begins a handoff: shakes hands if need be and reserves, in the background.

        Raises ValueError when the same attempt at the same request is already being handed to the same worker.
        """
        handoff = SenderHandoff(spec, self._context, self)
        if handoff.id in self._handoffs:
            raise ValueError(f"{handoff.id} is already under way")
        self._handoffs[handoff.id] = handoff
        self._context.stats.num_sending += 1
        self._spawn(handoff.open(self._pairs))
        return handoff

    async def reach(self, receiver: WorkerIdentity, address: str) -> None:
        """Shakes hands if need be. Raises TransferError when the two cannot exchange blocks."""
        await self._pairs.get(receiver, address)

    async def probe(self, receiver: WorkerIdentity, address: str) -> LinkReport:
        """What a canary to this receiver finds. Raises TransferError."""
        is_new = not self._pairs.has(receiver)
        pair = await self._pairs.get(receiver, address)
        return pair.report if is_new else await pair.measure()

    def tell(self, pair: OutgoingPair | None, message: m.Abort) -> None:
        """Tells the receiver in the background. It may be gone: its lease then says the same."""
        if pair is not None and not pair.is_closed:
            pair.wait_for(self._spawn(self._tell(pair, message)))

    def ended(self, handoff: SenderHandoff, error: TransferError | None) -> None:
        del self._handoffs[handoff.id]
        stats = self._context.stats
        stats.num_sending -= 1
        if error is None:
            stats.handoffs_sent += 1
        else:
            stats.failures[error.code.value] += 1
            _log.info("kv_handoff_failed", handoff=str(handoff.id), side="sender", reason=str(error))

    def tick(self) -> None:
        for handoff in list(self._handoffs.values()):
            handoff.tick()

    async def close(self) -> None:
        """Gives up what is under way, tells the receivers, and waits a little for both."""
        handoffs = list(self._handoffs.values())
        for handoff in handoffs:
            handoff.feed(m.GiveUp("the sender is shutting down", TransferCode.DRAINING))
        waiting = [asyncio.ensure_future(handoff.wait()) for handoff in handoffs] + list(self._tasks)
        if waiting:
            await asyncio.wait(waiting, timeout=self._context.options.close_timeout_s)
        for task in [*waiting, *self._tasks]:
            task.cancel()
        await self._pairs.close()

    async def _tell(self, pair: OutgoingPair, message: m.Abort) -> None:
        try:
            await pair.client.abort(message)
        except TransferError as error:
            _log.info("kv_abort_not_delivered", handoff=str(message.handoff), reason=error.message)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
