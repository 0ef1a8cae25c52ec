"""The decode side of a request: takes its blocks in, or prefills itself, and generates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.failpoint import TransferFailpoint
from baton.kvtransfer.fetch import NO_TOKEN
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.messages import FirstToken, Slot, TransferReport
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import SampledToken, TokenLogprobs
from baton.services.core.scheduler.base import RequestUpdate, Reservation
from baton.services.core.scheduler.decode import DecodeScheduler
from baton.services.runtime.failpoints import reach_async
from baton.services.worker.parts import WorkerParts
from baton.services.worker.requests import ActiveRequest, scheduler_id
from baton.services.worker.session import PlainTokens, Session
from baton.services.worker.transfer_errors import to_baton_error
from baton.services.worker.worker import Worker

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Expected:
    """A request whose blocks somebody will bring."""

    active: ActiveRequest
    key: HandoffKey
    sender: WorkerIdentity
    granted: asyncio.Future[Reservation] | None = None  # while the reservation waits for room


class DecodeWorker(Worker[DecodeScheduler]):
    """Generates. For the transfer agent it is the host that makes room and takes blocks over."""

    claim_failpoint = "decode.before_claim"

    def __init__(
        self,
        parts: WorkerParts,
        on_turn: Callable[[DecodeScheduler, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scheduler = DecodeScheduler(
            parts.pool, parts.namer, parts.limits, enable_prefix_caching=parts.prefix_caching, pace=parts.pace
        )
        super().__init__(parts, scheduler, on_turn=on_turn, clock=clock)
        self._expected: dict[str, _Expected] = {}

    def start(self, session: Session, command: decode_pb2.Start) -> None:
        """A Start command of a gateway."""
        active = self.admit(session, command.spec)
        if active is None:
            return
        if not command.HasField("prefill"):
            if command.HasField("fetch"):
                self.fetch_and_enqueue(active, command.fetch)
            else:
                self.enqueue(active)
            return
        key = HandoffKey(active.request_id, active.attempt)
        sender = WorkerIdentity(command.prefill.worker_id, command.prefill.incarnation)
        self._expected[active.id] = _Expected(active, key, sender)
        self.agent.expect(key, sender, active.request.deadline_s)

    # ReceiverHost: called by the transfer agent.

    async def reserve(
        self, key: HandoffKey, sender: WorkerIdentity, block_names: Sequence[bytes], num_tokens: int
    ) -> Sequence[Slot]:
        """Waits until the blocks fit, with room to grow. Cancelled when the sender gives up."""
        if key in self.fetcher:
            return await self.fetcher.reserve(key, sender, block_names, num_tokens)
        expected = self._expected.get(scheduler_id(key.request_id, key.attempt))
        if expected is None:
            raise TransferError(TransferCode.UNKNOWN_HANDOFF, f"{key} is not expected here")
        request = expected.active.request
        expected.granted = asyncio.get_running_loop().create_future()
        try:
            with suppress(BatonError):  # the first step that needs the grammar says what is wrong
                await self.compiled(request)
            reservation = await self.steps.call(
                lambda scheduler: scheduler.reserve(request, list(block_names), self._clock())
            )
            if reservation is None:
                reservation = await expected.granted
        except BatonError as error:
            code = TransferCode.INCOMPATIBLE if error.code is ErrorCode.INCOMPATIBLE else TransferCode.NO_CAPACITY
            raise TransferError(code, error.message) from error
        except asyncio.CancelledError:
            self._let_go(request.request_id, quiet=True)  # nobody was told of the slots, so nobody writes
            raise
        finally:
            expected.granted = None
        return [Slot(slot.index, slot.block_id, slot.generation) for slot in reservation.slots]

    async def committed(self, key: HandoffKey, first_token: FirstToken, report: TransferReport) -> None:
        """All blocks are here and verified: the request runs from its second token on."""
        if key in self.fetcher:
            await self.fetcher.committed(key, first_token, report)
            return
        await reach_async("decode.before_first", error=TransferFailpoint)
        if first_token == NO_TOKEN:
            raise TransferError(TransferCode.PROTOCOL, f"{key} came without a first token")
        expected = self._expected.get(scheduler_id(key.request_id, key.attempt))
        if expected is None:
            raise TransferError(TransferCode.ABORTED, f"{key} was cancelled")
        active = expected.active
        token = SampledToken(
            first_token.token_id,
            None if first_token.logprob is None else TokenLogprobs(first_token.logprob, first_token.top_logprobs),
        )

        def commit(scheduler: DecodeScheduler) -> None:
            scheduler.commit(active.id, token, self._clock())
            self.steps.tell(self._on_committed, expected, report)  # ahead of what the next step makes of it

        try:
            await self.steps.call(commit)
        except BatonError as error:
            raise TransferError(TransferCode.EXPIRED, error.message) from error

    def _on_committed(self, expected: _Expected, report: TransferReport) -> None:
        active = expected.active
        if self._expected.get(active.id) is expected:
            del self._expected[active.id]
            active.session.send([_arrival(active, report)])
        else:  # given up while the step thread was at it; the agent no longer gives such a handoff up
            self.steps.post(lambda scheduler: scheduler.abort(active.id))

    async def released(self, key: HandoffKey, error: TransferError, quiet: bool, verified: Sequence[int] = ()) -> None:
        """The handoff failed. The slots are free once no write can land in them; what was verified stays as cache."""
        if key in self.fetcher:
            await self.fetcher.released(key, error, quiet)
            return
        name = scheduler_id(key.request_id, key.attempt)
        self._let_go(name, quiet=quiet, verified=verified)
        expected = self._expected.pop(name, None)
        if expected is None:
            return
        if error.code is TransferCode.ABORTED:
            self.forget(expected.active)  # the sender gave up on purpose, and says itself why
        else:
            self.fail(expected.active, to_baton_error(error))

    def peers(self) -> dict[str, str]:
        return {active_id: str(expected.sender) for active_id, expected in self._expected.items()}

    def renew_leases(self) -> None:
        held = [(active_id, expected.key.attempt) for active_id, expected in self._expected.items()]
        now_s = self._clock()

        def renew(scheduler: DecodeScheduler) -> None:
            for active_id, attempt in held:
                scheduler.renew_lease(active_id, attempt, now_s)

        self.steps.post(renew)
        self.fetcher.renew_leases()

    def _let_go(self, request_id: str, *, quiet: bool, verified: Sequence[int] = ()) -> None:
        now_s = self._clock()

        def let_go(scheduler: DecodeScheduler) -> None:
            scheduler.abort_reservation(request_id, writes_quiet=quiet, now=now_s, verified=verified)
            if quiet:
                scheduler.release_quarantine(request_id)

        self.steps.post(let_go)

    # Worker.

    def _on_granted(self, reservation: Reservation) -> None:
        expected = self._expected.get(reservation.request.request_id)
        if expected is not None and expected.granted is not None and not expected.granted.done():
            expected.granted.set_result(reservation)

    def _on_update(self, active: ActiveRequest, update: RequestUpdate) -> pb.RequestOutput | PlainTokens | None:
        return self._tell_tokens(active, update)

    def _give_up(self, active: ActiveRequest, reason: str) -> None:
        self.forget(active)
        expected = self._expected.pop(active.id, None)
        if expected is not None:
            # The agent knows whether a write can still land, and calls ``released`` when it is over.
            self.agent.forget(expected.key)
        else:
            self.steps.post(lambda scheduler: scheduler.abort(active.id))


def _arrival(active: ActiveRequest, report: TransferReport) -> pb.RequestOutput:
    output = pb.RequestOutput(request_id=active.request_id, attempt=active.attempt)
    output.transfer.CopyFrom(
        pb.TransferReport(
            transport=report.transport,
            num_blocks=report.num_blocks,
            num_blocks_skipped=report.num_blocks_skipped,
            num_bytes=report.num_bytes,
            duration_ms=report.duration_ms,
            commit_ms=report.commit_ms,
            reserve_wait_ms=report.reserve_wait_ms,
            checksum=report.checksum,
            fallbacks=report.fallbacks,
        )
    )
    return output
