"""One request's path: route, start both workers, stream tokens in order, try again elsewhere, end exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.api.prefill.v1 import prefill_pb2
from baton.services.core.block_hash import BlockNamer
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.lifecycle import Instant
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.request import FinishReason
from baton.services.core.router import Candidate, Mode, Placement, RoutedRequest, RoutingDecision, WorkerView, route
from baton.services.gateway.generation import GenerationRequest, TokenDelta
from baton.services.gateway.receipts import Attempt, GenerationRecord, ReceiptBook
from baton.services.gateway.registry import Registry, block_bytes
from baton.services.gateway.token_order import TokenOrder
from baton.services.gateway.worker_link import Arrival, WorkerLink
from baton.services.runtime import convert

log = structlog.get_logger(__name__)

# The ladder of a request: a pair, another pair, then decode workers alone.
MAX_ATTEMPTS = 4
MAX_PAIR_ATTEMPTS = 2
# A request under which so many workers died is not tried on a third.
MAX_LOST_WORKERS = 2


class AttemptFailed(Exception):
    """An attempt ended without an answer. ``blamed`` is the incarnation that the next attempt avoids."""

    def __init__(self, error: BatonError, blamed: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.blamed = blamed


@dataclass(slots=True)
class _Run:
    """What one generation has so far."""

    request: GenerationRequest
    record: GenerationRecord
    deadline_s: float | None
    block_names: list[bytes]
    tokens: list[int] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    num_lost: int = 0  # workers whose streams broke while they had this request

    @property
    def spec_tokens(self) -> list[int]:
        return self.request.prompt_token_ids + self.tokens


class WorkerDispatcher:
    """The Dispatcher of production: workers found by the registry, pairs chosen by the router."""

    def __init__(
        self,
        registry: Registry,
        prefix_index: PrefixIndex,
        block_key: bytes,
        receipts: ReceiptBook,
        *,
        clock: Callable[[], float],
        placement: Placement = Placement.REMOTE,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_start = on_start
        self._placement = placement
        self._registry = registry
        self._prefix_index = prefix_index
        self._block_key = block_key
        self._receipts = receipts
        self._clock = clock
        self._records: dict[str, GenerationRecord] = {}

    @property
    def num_running(self) -> int:
        return len(self._records)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See Dispatcher. Tokens have gap-free indices from 0, whatever workers they came from."""
        record = self._receipts.open(request)
        self._records[request.request_id] = record
        self._on_start()
        outcome = "abort"  # unless something below says otherwise: the caller closed us
        try:
            async with aclosing(self._attempts(request, record)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is not None:
                        outcome = delta.finish_reason.value
                        self._end(record, outcome)
                    yield delta
        except Exception as error:
            is_refused = isinstance(error, BatonError) and error.code is ErrorCode.NO_WORKERS and not record.attempts
            outcome = "refused" if is_refused else "error"
            raise
        finally:
            self._records.pop(request.request_id, None)
            self._end(record, outcome)

    def finish(self, request: GenerationRequest, reason: str) -> None:
        """The API layer ends the request itself, at a stop string: that is its outcome, not the cancellation after it."""
        record = self._records.get(request.request_id)
        if record is not None:
            self._end(record, reason)

    def _end(self, record: GenerationRecord, outcome: str) -> None:
        record.trace.mark(Instant.ENDED, self._clock())
        self._receipts.end(record, outcome)

    async def _attempts(self, request: GenerationRequest, record: GenerationRecord) -> AsyncGenerator[TokenDelta, None]:
        deadline_s = None if request.timeout_s is None else self._clock() + request.timeout_s
        run = _Run(request, record, deadline_s, self._block_names(request))
        while True:
            number = len(record.attempts) + 1
            placement = self._placement if number <= MAX_PAIR_ATTEMPTS else Placement.LOCAL
            attempt = Attempt(number, self._route(run, placement))
            record.attempts.append(attempt)
            try:
                async with aclosing(self._attempt(run, attempt)) as deltas:
                    async for delta in deltas:
                        run.tokens.extend(token.token_id for token in delta.tokens)
                        record.completion_tokens = len(run.tokens)
                        if delta.finish_reason is not None:
                            attempt.outcome = "done"
                        yield delta
                return
            except AttemptFailed as failure:
                attempt.outcome = failure.error.code.value
                if failure.blamed is not None:
                    run.excluded.add(failure.blamed)
                if not self._may_go_on(run, attempt, failure.error):
                    raise failure.error from failure
                record.fallbacks.append(failure.error.code.value)
                log.warning(
                    "attempt failed, trying again",
                    request_id=request.request_id,
                    attempt=attempt.number,
                    code=failure.error.code.value,
                    cause=failure.error.message,
                )

    def _may_go_on(self, run: _Run, attempt: Attempt, error: BatonError) -> bool:
        is_in_time = run.deadline_s is None or self._clock() < run.deadline_s
        return error.retryable and is_in_time and attempt.number < MAX_ATTEMPTS and run.num_lost < MAX_LOST_WORKERS

    def _route(self, run: _Run, placement: Placement) -> RoutingDecision:
        compatibility = self._registry.compatibility()
        layout = pb.KVLayout() if compatibility is None else compatibility.layout
        routed = RoutedRequest(
            request_id=run.request.request_id,
            num_tokens=len(run.spec_tokens),
            block_size=layout.block_size or 16,
            block_bytes=block_bytes(layout),
            cached_blocks=self._prefix_index.matches(run.block_names),
            excluded=run.excluded,
        )
        decision = route(routed, self._registry.views(), placement)
        run.request.trace.mark(Instant.ROUTED, self._clock())
        return decision

    async def _attempt(self, run: _Run, attempt: Attempt) -> AsyncGenerator[TokenDelta, None]:
        """Runs one attempt. However it ends, both workers are told and their requests released."""
        chosen = attempt.decision.chosen
        key = (run.request.request_id, attempt.number)
        arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        decode = self._link(chosen.decode)
        prefill = self._link(chosen.prefill) if chosen.prefill is not None else None
        sent_s = self._clock()
        is_ended = decode_goes_on = False
        try:
            self._start(run, attempt.number, chosen, prefill, decode, arrivals)
            order = TokenOrder(next_index=len(run.tokens))
            while not is_ended:
                arrival = await self._next(run, arrivals)
                if arrival.is_failure and arrival.link is prefill and decode_goes_on and order.has_begun:
                    # It was lost, or the acknowledgement was, behind a handoff that succeeded.
                    arrival.link.release(key, cancel=False)
                    continue
                if arrival.failure is not None:
                    run.num_lost += 1
                    raise AttemptFailed(arrival.failure, arrival.link.incarnation)
                output = arrival.output
                assert output is not None
                decode_goes_on = decode_goes_on or (arrival.link is decode and not arrival.is_failure)
                self._note(run, output, sent_s, chosen.mode)
                if output.finish_reason == pb.FINISH_REASON_ERROR:
                    raise AttemptFailed(convert.error_from_wire(output.error), arrival.link.incarnation)
                if output.finish_reason or output.handed_over:
                    arrival.link.release(key, cancel=False)  # that worker is done with it
                for delta in order.push(output):
                    if delta.tokens:
                        run.request.trace.mark(Instant.FIRST_TOKEN, self._clock())
                    is_ended = delta.finish_reason is not None
                    if delta.finish_reason is FinishReason.ABORT:
                        error = BatonError(ErrorCode.WORKER_LOST, "the worker gave the request up", retryable=True)
                        raise AttemptFailed(error, arrival.link.incarnation)
                    yield delta
        finally:
            for link in (decode, prefill):
                if link is not None:
                    link.release(key, cancel=True)

    def _start(
        self,
        run: _Run,
        number: int,
        chosen: Candidate,
        prefill: WorkerLink | None,
        decode: WorkerLink,
        arrivals: asyncio.Queue[Arrival],
    ) -> None:
        request = run.request
        remaining_s = None if run.deadline_s is None else run.deadline_s - self._clock()
        spec = pb.GenerationSpec(
            request_id=request.request_id,
            attempt=number,
            token_ids=run.spec_tokens,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=convert.sampling_to_wire(request.sampling),
            cache_salt=request.cache_salt,
            deadline_ms=0 if remaining_s is None else max(1, int(remaining_s * 1e3)),
        )
        if prefill is None:
            decode.start(decode_pb2.Start(spec=spec), arrivals)
            return
        # The decode worker first: it then knows of the handoff when the prefill worker asks it for slots.
        decode.start(decode_pb2.Start(spec=spec, prefill=prefill.identity), arrivals)
        prefill.start(
            prefill_pb2.Start(spec=spec, decode=decode.identity, decode_address=chosen.decode.address), arrivals
        )

    async def _next(self, run: _Run, arrivals: asyncio.Queue[Arrival]) -> Arrival:
        if run.deadline_s is None:
            return await arrivals.get()
        try:
            async with asyncio.timeout(run.deadline_s - self._clock()):
                return await arrivals.get()
        except TimeoutError:
            error = BatonError(ErrorCode.DEADLINE_EXCEEDED, f"the request's time, {run.request.timeout_s:g} s, is over")
            raise AttemptFailed(error, None) from None

    def _note(self, run: _Run, output: pb.RequestOutput, sent_s: float, mode: Mode) -> None:
        """Takes the workers' own measurements into trace and receipt."""
        trace, record = run.request.trace, run.record
        if output.HasField("prefill"):
            start_s = sent_s + output.prefill.queue_ms / 1e3
            trace.mark(Instant.PREFILL_START, start_s)
            trace.mark(Instant.PREFILL_END, start_s + output.prefill.prefill_ms / 1e3)
            if not run.tokens:  # what a later attempt finds is, in part, this request's own
                record.cached_tokens = output.prefill.cached_tokens
        if output.HasField("transfer"):
            record.transfer = output.transfer
            trace.mark(Instant.TRANSFER_END, self._clock())

    def _link(self, view: WorkerView) -> WorkerLink:
        known = self._registry.get(view.worker_id)
        if known is None or known.link.incarnation != view.incarnation:
            error = BatonError(ErrorCode.WORKER_LOST, f"worker {view.worker_id} has just gone", retryable=True)
            raise AttemptFailed(error, view.incarnation)
        return known.link

    def _block_names(self, request: GenerationRequest) -> list[bytes]:
        """What the decode workers call the prompt's blocks. Empty while no worker is known."""
        compatibility = self._registry.compatibility()
        if compatibility is None:
            return []
        namer = BlockNamer(self._block_key, compatibility.model_fingerprint)
        return namer.names(request.prompt_token_ids, compatibility.layout.block_size, request.cache_salt)
