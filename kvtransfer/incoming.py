"""One handoff under way, as its receiver runs it: a machine, the host that it asks for room, and those who wait for answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol

import structlog

from baton.kvtransfer import messages as m
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.driver import Driver
from baton.kvtransfer.errors import LocalProtocolError, TransferCode, TransferError
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.protocol import ReceiverState
from baton.kvtransfer.receiver import Receiver
from baton.kvtransfer.transport.base import Arrival, Landed
from baton.kvtransfer.transport.frames import Blocks
from baton.kvtransfer.transport.listener import IncomingPair, Inlet
from baton.kvtransfer.transport.stream import Payload

_log = structlog.get_logger(__name__)


class ReceiverHost(Protocol):
    """What a worker does for blocks it receives. Called on the event loop; calls of one handoff come one after the other."""

    async def reserve(
        self, key: HandoffKey, sender: WorkerIdentity, block_names: Sequence[bytes], num_tokens: int
    ) -> Sequence[m.Slot]:
        """Waits for room, and returns a slot for every block that is not here already, by index.

        Raises TransferError (NO_CAPACITY, DRAINING, ...) to refuse. Cancelled when the sender gives up; then, as after an
        error, the worker holds nothing for it.
        """
        ...

    async def committed(self, key: HandoffKey, first_token: m.FirstToken, report: m.TransferReport) -> None:
        """Every block is here and verified: makes them readable. They are the worker's from now on.

        Raises TransferError to refuse after all; then ``released`` follows.
        """
        ...

    async def released(self, key: HandoffKey, error: TransferError, quiet: bool, verified: Sequence[int] = ()) -> None:
        """The slots of ``reserve`` are given up. While not ``quiet`` a write can still land; a second call says when it is.

        ``verified``: the blocks at these indices are whole all the same and may be kept under their names.
        """
        ...


class ReceiverHandoff:
    """Lives on the event loop. Kept after its end for a while, to answer late messages."""

    def __init__(
        self,
        handoff: HandoffId,
        pair: IncomingPair,
        context: AgentContext,
        host: ReceiverHost,
        *,
        token: bytes,
        deadline_s: float | None,
        ended: Callable[[ReceiverHandoff], None],
    ) -> None:
        self.id = handoff
        self.pair = pair
        self._context = context
        self._host = host
        self._ended = ended
        self._machine = Receiver(
            handoff,
            token=token,
            block_bytes=context.memory.block_bytes,
            limits=context.options.limits,
            deadline_s=deadline_s,
        )
        self._driver = Driver(self._machine, self._perform, context.clock)
        self._asking: asyncio.Task[Sequence[m.Slot]] | None = None
        self._host_calls: asyncio.Task[None] | None = None  # the last one; each waits for the one before
        self._reserve_answers: list[asyncio.Future[m.Grant | m.Refuse]] = []
        self._commit_answers: list[asyncio.Future[m.Ack | m.Incomplete | m.Refuse]] = []
        self._allowed: set[int] = set()
        self._is_renewed = False
        self._inlet: Inlet | None = None  # the connection that last brought blocks
        self._fallbacks: tuple[str, ...] = ()

    @property
    def is_over(self) -> bool:
        return self._machine.is_over

    @property
    def num_quarantined(self) -> int:
        return self._machine.num_quarantined

    @property
    def error(self) -> TransferError | None:
        return self._machine.error

    # What the sender says.

    async def reserve(self, message: m.Reserve) -> m.Grant | m.Refuse:
        answer: asyncio.Future[m.Grant | m.Refuse] = asyncio.get_running_loop().create_future()
        self._reserve_answers.append(answer)
        self.feed(message)
        try:
            return await answer
        except asyncio.CancelledError:
            if self._machine.state is ReceiverState.RESERVING:
                self.feed(m.GiveUp("the sender stopped waiting for slots"))
            raise

    async def commit(self, message: m.Commit) -> m.Ack | m.Incomplete | m.Refuse:
        answer: asyncio.Future[m.Ack | m.Incomplete | m.Refuse] = asyncio.get_running_loop().create_future()
        self._commit_answers.append(answer)
        self.feed(message)
        return await answer

    def renew(self, sent_s: float) -> bool:
        """Whether the lease was renewed."""
        self._is_renewed = False
        self.feed(m.Renew(self.id, sent_s))
        return self._is_renewed

    def push(self, inlet: Inlet, token: bytes, blocks: Blocks) -> Payload | None:
        """Blocks were announced. Raises Fenced for a wrong token."""
        self._inlet = inlet
        self._allowed = set()
        self.feed(m.Push(self.id, token, blocks.slots()))
        arrival = Arrival(self.id.digest, blocks, self._allowed, self.pair.source, inlet.resume, self._on_ended)
        return self.pair.transport.land(arrival)

    def move(self, pair: IncomingPair, failed: Sequence[str]) -> None:
        """From now on blocks come by another transport, since these have failed."""
        self.pair.transport.stop(self.id.digest)
        self.pair, self._inlet = pair, None
        self._fallbacks += tuple(failed)

    # What happens here.

    def feed(self, event: m.Event) -> None:
        self._driver.feed(event)

    def tick(self) -> None:
        self._driver.tick()

    async def settle(self) -> None:
        """Waits for what the host is still being asked and told."""
        if self._asking is not None and not self._asking.done():
            await asyncio.wait([self._asking])
        while self._host_calls is not None and not self._host_calls.done():
            await asyncio.wait([self._host_calls])

    def _perform(self, command: m.Command) -> None:
        match command:
            case m.Send(message):
                self._tell_sender(message)
            case m.ReserveSlots(block_names, num_tokens):
                key, sender = self.id.key, self.id.sender
                self._asking = asyncio.ensure_future(self._host.reserve(key, sender, block_names, num_tokens))
                self._asking.add_done_callback(self._on_reserved)
            case m.StopReserving():
                assert self._asking is not None
                self._asking.cancel()
            case m.LetLand(indices):
                self._allowed |= set(indices)
            case m.Discard():
                is_repeated = self._machine.state in (ReceiverState.RECEIVING, ReceiverState.COMMITTING)
                self._context.stats.fenced += not is_repeated
            case m.StopLanding():
                self.pair.transport.stop(self.id.digest)
            case m.Adopt(first_token, report):
                now = replace(report, transport=self.pair.transport.name, fallbacks=self._fallbacks)
                self._tell_host(self._adopt(first_token, now))
            case m.ReleaseSlots(error, quiet, verified):
                self._tell_host(self._host.released(self.id.key, error, quiet, verified))
            case m.Done():
                self._ended(self)

    def _tell_sender(self, message: m.PeerMessage) -> None:
        match message:
            case m.Verdicts(_, landed, corrupt):
                if self._inlet is not None:
                    self._inlet.send_verdicts(self.id.digest, landed, corrupt)
            case m.Renewed():
                self._is_renewed = True
            case m.Grant():
                _answer(self._reserve_answers, message)
            case m.Ack() | m.Incomplete():
                _answer(self._commit_answers, message)
            case m.Refuse(_, code, reason):
                if not _answer(self._reserve_answers, message) + _answer(self._commit_answers, message):
                    inlet = self._inlet or next(iter(self.pair.inlets), None)
                    if inlet is not None:
                        inlet.send_gone(self.id.digest, code, reason)

    def _on_reserved(self, task: asyncio.Task[Sequence[m.Slot]]) -> None:
        if task.cancelled():
            self.feed(m.SlotsRefused(TransferCode.ABORTED, "no longer asked for"))
            return
        match task.exception():
            case None:
                self._take_slots(tuple(task.result()))
            case TransferError() as error:
                self.feed(m.SlotsRefused(error.code, error.message))
            case error:
                _log.error("kv_reserve_failed", handoff=str(self.id), exc_info=error)
                self.feed(m.SlotsRefused(TransferCode.INTERNAL, "the receiver failed to make room"))

    def _take_slots(self, slots: tuple[m.Slot, ...]) -> None:
        try:
            block_ids = [slot[1] for slot in slots]
            if block_ids and not (min(block_ids) >= 0 and max(block_ids) < self._context.memory.num_blocks):
                raise LocalProtocolError("a slot outside the pool")
            self.feed(m.SlotsReserved(slots))
        except LocalProtocolError as error:
            _log.error("kv_reserve_failed", handoff=str(self.id), reason=error.message)
            self._tell_host(self._host.released(self.id.key, error, True))
            self.feed(m.SlotsRefused(TransferCode.INTERNAL, "the receiver made room that does not fit the blocks"))

    def _on_ended(self, landed: Landed) -> None:
        stats = self._context.stats
        stats.bytes_received[self.pair.transport.name] += len(landed.landed) * self._context.memory.block_bytes
        stats.corrupt_blocks += len(landed.corrupt)
        if landed.landed or landed.corrupt or landed.broken:
            self.feed(m.LandingEnded(tuple(landed.landed), tuple(landed.corrupt), tuple(landed.broken)))

    async def _adopt(self, first_token: m.FirstToken, report: m.TransferReport) -> None:
        try:
            await self._host.committed(self.id.key, first_token, report)
        except TransferError as error:
            self.feed(m.AdoptFailed(error.code, error.message))
        except Exception:
            _log.exception("kv_adopt_failed", handoff=str(self.id))
            self.feed(m.AdoptFailed(TransferCode.INTERNAL, "the receiver failed to take the blocks over"))
        else:
            self.feed(m.Adopted())

    def _tell_host(self, call: Coroutine[Any, Any, None]) -> None:
        self._host_calls = asyncio.create_task(self._call_host(self._host_calls, call))

    async def _call_host(self, previous: asyncio.Task[None] | None, call: Coroutine[Any, Any, None]) -> None:
        if previous is not None and not previous.done():
            await asyncio.wait([previous])
        try:
            await call
        except Exception:
            _log.exception("kv_host_failed", handoff=str(self.id))


def _answer(waiting: list[asyncio.Future[Any]], message: m.PeerMessage) -> bool:
    """Answers everybody who waits for this. False: nobody did."""
    open_questions = [future for future in waiting if not future.done()]
    waiting.clear()
    for future in open_questions:
        future.set_result(message)
    return bool(open_questions)
