"""The worker's half of moving cached blocks: it fetches what a prompt needs and another worker holds, and gives what it holds.

A fetch only saves time. So it never waits for room, it is given up when its patience is over, and however it ends the
prompt is computed from whatever is here then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.fetch import NO_TOKEN
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.messages import FirstToken, Slot, TransferReport
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.scheduler.cache_moves import MovesCache
from baton.services.core.slo import ServiceLevel
from baton.services.worker.step_loop import StepLoop

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """A fetch under way. ``done`` gets what became of it."""

    names: tuple[bytes, ...]
    level: ServiceLevel  # of the request that they come for
    done: asyncio.Future[TransferReport | TransferError]

    def end(self, outcome: TransferReport | TransferError) -> None:
        if not self.done.done():
            self.done.set_result(outcome)


class BlockFetcher:
    """A ``ReceiverHost`` for what was asked for here, and the ``BlockHolder`` for what peers ask for.

    ``agent`` and ``own_address`` (host:port of this worker's gRPC services) are set by the host before anything starts.
    """

    agent: TransferAgent
    own_address: str = ""

    def __init__(self, steps: StepLoop[Any], block_size: int, clock: Callable[[], float]) -> None:
        self._steps = steps
        self._block_size = block_size
        self._clock = clock
        self._wanted: dict[HandoffKey, _Wanted] = {}
        self._turns: dict[bytes, asyncio.Future[None]] = {}  # the fetch under way of a chain, by the name of its end
        self._taking: set[HandoffKey] = set()  # handoffs that hold slots here
        self._giving: set[HandoffId] = set()
        self._is_draining = False
        self._gave_all = asyncio.Event()
        self._gave_all.set()

    def __contains__(self, key: HandoffKey) -> bool:
        """The handoff was asked for here, and is not over."""
        return key in self._wanted or key in self._taking

    # Fetching.

    async def fetch(
        self,
        key: HandoffKey,
        source: pb.FetchSource,
        block_names: Sequence[bytes],
        deadline_s: float | None,
        level: ServiceLevel,
    ) -> pb.FetchReport | None:
        """Brings the leading blocks that ``source`` names here. None: they are here already.

        ``block_names`` are the prompt's, ``level`` is the request's. Never raises: a report with an error says why they did
        not come.
        """
        names = tuple(block_names[: source.num_blocks])
        if not names:
            return None
        started_s = self._clock()
        until_s = started_s + source.patience_ms / 1e3
        until_s = until_s if deadline_s is None else min(until_s, deadline_s)
        outcome: TransferReport | TransferError
        try:
            async with asyncio.timeout(until_s - started_s), self._turn(names[-1]):
                if len(names) == await self._steps.call(lambda scheduler: len(scheduler.pool.lookup(names))):
                    return None
                outcome = await self._ask(key, source, names, until_s, level)
        except TimeoutError:
            outcome = TransferError(TransferCode.EXPIRED, f"not here after {until_s - started_s:.3f} s")
        except TransferError as error:
            outcome = error
        except BatonError as error:
            outcome = TransferError(TransferCode.DRAINING, error.message)
        except Exception as error:
            log.exception("fetch failed", request_id=key.request_id)
            outcome = TransferError(TransferCode.INTERNAL, f"the fetch failed: {type(error).__name__}")
        report = _report(source.holder.worker_id, outcome, (self._clock() - started_s) * 1e3)
        if report.HasField("error"):
            log.info("blocks not fetched", request_id=key.request_id, holder=report.holder, cause=report.error.message)
        return report

    @asynccontextmanager
    async def _turn(self, end: bytes) -> AsyncIterator[None]:
        """Several choices of one prompt need the same blocks: one after the other, so that the first brings them for all."""
        while (other := self._turns.get(end)) is not None:
            await asyncio.wait([other])
        turn = self._turns[end] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._turns[end]
            turn.set_result(None)

    async def _ask(
        self, key: HandoffKey, source: pb.FetchSource, names: tuple[bytes, ...], until_s: float, level: ServiceLevel
    ) -> TransferReport | TransferError:
        if key in self:
            return TransferError(TransferCode.PROTOCOL, f"{key} is already being fetched")
        wanted = self._wanted[key] = _Wanted(names, level, asyncio.get_running_loop().create_future())
        holder = WorkerIdentity(source.holder.worker_id, source.holder.incarnation)
        try:
            await self.agent.fetch(key, holder, source.address, self.own_address, names, until_s)
            return await wanted.done
        finally:
            del self._wanted[key]
            wanted.end(TransferError(TransferCode.ABORTED, "given up"))
            self.agent.forget(key)  # under way it is given up, and ``released`` says when the slots are free

    # ReceiverHost, for the handoffs that were asked for.

    async def reserve(
        self, key: HandoffKey, sender: WorkerIdentity, block_names: Sequence[bytes], num_tokens: int
    ) -> Sequence[Slot]:
        wanted, names = self._wanted.get(key), tuple(block_names)
        if wanted is None:
            raise TransferError(TransferCode.UNKNOWN_HANDOFF, f"{key} was not asked for here")
        if names != wanted.names[: len(names)] or num_tokens != len(names) * self._block_size:
            error = TransferError(TransferCode.PROTOCOL, f"{sender} hands over other blocks than it was asked for")
            wanted.end(error)
            raise error
        label = _label(key)

        def take(scheduler: MovesCache) -> tuple[Slot, ...]:
            slots = scheduler.moves.reserve(label, names, scheduler.room_for_moves(), self._clock(), wanted.level)
            return tuple(Slot(slot.index, slot.block_id, slot.generation) for slot in slots)

        self._taking.add(key)
        try:
            return await self._steps.call(take)
        except BatonError as refusal:
            self._taking.discard(key)
            is_full = refusal.code is ErrorCode.OVERLOADED
            error = TransferError(TransferCode.NO_CAPACITY if is_full else TransferCode.DRAINING, refusal.message)
            wanted.end(error)
            raise error from refusal
        except asyncio.CancelledError:
            self._let_go(key, quiet=True)  # nobody was told of the slots, so nobody writes
            wanted.end(TransferError(TransferCode.ABORTED, f"{sender} gave up"))
            raise

    async def committed(self, key: HandoffKey, first_token: FirstToken, report: TransferReport) -> None:
        if first_token != NO_TOKEN:
            raise TransferError(TransferCode.PROTOCOL, f"{key} moves cached blocks, and came with a first token")
        try:
            await self._steps.call(lambda scheduler: scheduler.moves.commit(_label(key)))
        except BatonError as error:
            raise TransferError(TransferCode.EXPIRED, error.message) from error
        self._taking.discard(key)
        if (wanted := self._wanted.get(key)) is not None:
            wanted.end(report)

    async def released(self, key: HandoffKey, error: TransferError, quiet: bool, verified: Sequence[int] = ()) -> None:
        self._let_go(key, quiet=quiet)
        if (wanted := self._wanted.get(key)) is not None:
            wanted.end(error)

    def _let_go(self, key: HandoffKey, *, quiet: bool) -> None:
        if quiet:
            self._taking.discard(key)
        label, now_s = _label(key), self._clock()
        self._steps.post(lambda scheduler: scheduler.moves.let_go(label, writes_quiet=quiet, now=now_s))

    # BlockHolder.

    async def pin(self, handoff: HandoffId, block_names: Sequence[bytes]) -> Sequence[int]:
        if self._is_draining:
            raise TransferError(TransferCode.DRAINING, f"{handoff.sender} is draining")
        label = _label(handoff.key, handoff.receiver)
        try:
            block_ids: list[int] = await self._steps.call(
                lambda scheduler: scheduler.moves.pin(label, block_names, self._clock())
            )
        except BatonError as error:
            raise TransferError(TransferCode.ABORTED, error.message) from error
        except asyncio.CancelledError:
            self.unpin(handoff)
            raise
        if block_ids:
            self._giving.add(handoff)
            self._gave_all.clear()
        return block_ids

    def unpin(self, handoff: HandoffId) -> None:
        self._giving.discard(handoff)
        if not self._giving:
            self._gave_all.set()
        label = _label(handoff.key, handoff.receiver)
        self._steps.post(lambda scheduler: scheduler.moves.unpin(label))

    # Both.

    def renew_leases(self) -> None:
        """Called a few times in a lease."""
        labels = [_label(key) for key in self._taking]
        labels += [_label(handoff.key, handoff.receiver) for handoff in self._giving]
        if labels:
            now_s = self._clock()
            self._steps.post(lambda scheduler: scheduler.moves.renew(labels, now_s))

    async def drain(self) -> None:
        """Gives nothing new, and returns when what is being given has arrived or was given up."""
        self._is_draining = True
        await self._gave_all.wait()


def _label(key: HandoffKey, receiver: WorkerIdentity | None = None) -> str:
    """What the pool calls the move: the handoff, and for a given one to whom."""
    label = f"{key.request_id}/{key.attempt}"
    return label if receiver is None else f"{label} to {receiver}"


def _report(holder_id: str, outcome: TransferReport | TransferError, duration_ms: float) -> pb.FetchReport:
    if isinstance(outcome, TransferError):
        error = pb.ErrorDetail(code=outcome.code.value, message=outcome.message, retryable=outcome.retryable)
        return pb.FetchReport(holder=holder_id, duration_ms=duration_ms, error=error)
    return pb.FetchReport(
        holder=holder_id,
        transport=outcome.transport,
        num_blocks=outcome.num_blocks,
        num_blocks_skipped=outcome.num_blocks_skipped,
        num_bytes=outcome.num_bytes,
        duration_ms=duration_ms,
    )
