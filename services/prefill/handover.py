"""The prefill side: computes a prompt, sends its blocks while later chunks compute, lets go on the acknowledgement. What comes
without a decode worker it answers itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.prefill.v1 import prefill_pb2
from baton.kvtransfer.errors import TransferError
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.messages import FirstToken
from baton.kvtransfer.sending import HandoffSpec, SenderHandoff
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import SampledToken
from baton.services.core.scheduler.base import RequestUpdate
from baton.services.core.scheduler.finish import ends_with_next_token
from baton.services.core.scheduler.prefill import PrefillScheduler
from baton.services.worker.parts import WorkerParts
from baton.services.worker.requests import ActiveRequest
from baton.services.worker.session import PlainTokens, Session
from baton.services.worker.transfer_errors import to_baton_error
from baton.services.worker.worker import Worker

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Destination:
    """Where a request's blocks go, and the handoff once it is open."""

    spec: HandoffSpec
    is_needed: bool  # the first token does not end the request anyway
    handoff: SenderHandoff | None = None


class PrefillWorker(Worker[PrefillScheduler]):
    """Runs prompts and hands them over, or goes on to the end of the answer."""

    claim_failpoint = "prefill.before_claim"

    def __init__(
        self,
        parts: WorkerParts,
        on_turn: Callable[[PrefillScheduler, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scheduler = PrefillScheduler(
            parts.pool, parts.namer, parts.limits, enable_prefix_caching=parts.prefix_caching, pace=parts.pace
        )
        super().__init__(parts, scheduler, on_turn=on_turn, clock=clock)
        self._destinations: dict[str, _Destination] = {}  # of those that are handed over

    def start(self, session: Session, command: prefill_pb2.Start) -> None:
        """A Start command of a gateway."""
        active = self.admit(session, command.spec)
        if active is None:
            return
        if command.HasField("decode"):
            self._destinations[active.id] = self._destination(active, command)
        if command.HasField("fetch"):
            self.fetch_and_enqueue(active, command.fetch)
        else:
            self.enqueue(active)

    def _destination(self, active: ActiveRequest, command: prefill_pb2.Start) -> _Destination:
        request = active.request
        return _Destination(
            HandoffSpec(
                request_id=active.request_id,
                attempt=active.attempt,
                receiver=WorkerIdentity(command.decode.worker_id, command.decode.incarnation),
                receiver_address=command.decode_address,
                block_names=tuple(self.block_names(request)),
                num_tokens=request.num_tokens,
                deadline_s=request.deadline_s,
                on_done=lambda error: self._on_done(active, error),
            ),
            is_needed=not ends_with_next_token(request, self.limits.max_model_len),
        )

    def _adding(self, active: ActiveRequest) -> Callable[[PrefillScheduler], None]:
        request, is_whole = active.request, active.id not in self._destinations
        return lambda scheduler: scheduler.add(request, is_whole=is_whole)

    def _on_started(self, active: ActiveRequest) -> None:
        # Not earlier: until now the prompt has only waited, and blocks reserved for it over there would wait with it.
        destination = self._destinations.get(active.id)
        if destination is None or not destination.is_needed or destination.handoff is not None:
            return
        try:
            destination.handoff = self.agent.open(destination.spec)
        except ValueError:  # an earlier start of the same attempt was given up, and its handoff is not over yet
            error = BatonError(ErrorCode.INVALID_REQUEST, f"request {active.id} was started twice")
            self.steps.post(lambda scheduler: scheduler.abort(active.id))
            self.fail(active, error)

    def _on_update(self, active: ActiveRequest, update: RequestUpdate) -> pb.RequestOutput | PlainTokens | None:
        destination = self._destinations.get(active.id)
        if destination is None:
            return self._tell_tokens(active, update)
        handoff = destination.handoff
        if handoff is not None and update.completed_blocks:
            handoff.blocks_ready(dict(zip(update.completed_blocks, update.completed_block_ids, strict=True)))
        if not update.new_tokens:
            return None
        output = active.output(update)
        if update.finished:
            self.forget(active)
            if handoff is not None:
                self.spawn(handoff.abort("the first token was the last"), name=f"abort-{active.id}")  # then _on_done
        else:
            assert handoff is not None
            self.spawn(self._commit(active, handoff, update.new_tokens[0]), name=f"commit-{active.id}")
        return output

    async def _commit(self, active: ActiveRequest, handoff: SenderHandoff, token: SampledToken) -> None:
        logprobs = token.logprobs
        first_token = FirstToken(
            token.token_id, logprobs.logprob if logprobs else None, logprobs.top if logprobs else ()
        )
        try:
            await handoff.commit(first_token)
        except TransferError:
            return  # told of by _on_done
        if self.forget(active):
            handed_over = pb.RequestOutput(request_id=active.request_id, attempt=active.attempt, handed_over=True)
            active.session.send([handed_over])

    def _on_done(self, active: ActiveRequest, error: TransferError | None) -> None:
        """The handoff is over, once, and nothing reads the blocks any more: the transfer lets go of them."""
        if error is not None and self.forget(active):
            log.warning("handoff failed", request_id=active.request_id, attempt=active.attempt, cause=str(error))
            active.session.send([active.failure(to_baton_error(error))])
            self.steps.post(lambda scheduler: scheduler.abort(active.id))
        self.steps.post(lambda scheduler: scheduler.release(active.id))

    def peers(self) -> dict[str, str]:
        return {active_id: str(d.spec.receiver) for active_id, d in self._destinations.items() if d.is_needed}

    def renew_leases(self) -> None:
        held = [(active_id, d.spec.attempt) for active_id, d in self._destinations.items() if d.handoff is not None]
        now_s = self._clock()

        def renew(scheduler: PrefillScheduler) -> None:
            for active_id, attempt in held:
                scheduler.renew_lease(active_id, attempt, now_s)

        self.steps.post(renew)
        self.fetcher.renew_leases()

    def _give_up(self, active: ActiveRequest, reason: str) -> None:
        destination = self._destinations.get(active.id)
        self.forget(active)
        self.steps.post(lambda scheduler: scheduler.abort(active.id))
        if destination is not None and destination.handoff is not None:
            self.spawn(destination.handoff.abort(reason), name=f"abort-{active.id}")
        else:
            # Its first step may be under way, and have blocks to report to a handoff that will now never be.
            self.steps.post(lambda scheduler: scheduler.release(active.id))

    def forget(self, active: ActiveRequest) -> bool:
        self._destinations.pop(active.id, None)
        return super().forget(active)
