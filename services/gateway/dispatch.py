"""Carries one request through the workers: asks the ladder what to do, does it, tells it what came of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.api.prefill.v1 import prefill_pb2
from baton.services.core.block_hash import BlockNamer
from baton.services.core.fetch import FETCH_FAILED, FetchPlan, FetchPolicy
from baton.services.core.ladder import Ladder
from baton.services.core.ladder_steps import Attempt, Command, Emit, End, LadderLimits, PartOutput, Release, Start, Wish
from baton.services.core.lifecycle import Instant
from baton.services.core.links import OTHER_TRANSPORT, LinkMatrix, PairKey, blames_link
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.quick_route import FleetRouter
from baton.services.core.router import Answer, Placement, Role, RoutedRequest, RoutingDecision, WorkerView
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.generation import GenerationRequest
from baton.services.gateway.layouts import block_bytes
from baton.services.gateway.outputs import part_output, plain_delta
from baton.services.gateway.receipts import GenerationRecord, ReceiptBook
from baton.services.gateway.registry import Registry
from baton.services.gateway.run import Run
from baton.services.gateway.worker_link import Arrival, WorkerLink
from baton.services.runtime import convert

log = structlog.get_logger(__name__)


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
        limits: LadderLimits | None = None,
        fetch: FetchPolicy | None = None,
        on_start: Callable[[], None] = lambda: None,
        links: LinkMatrix | None = None,
        output_lengths: OutputLengthEstimator | None = None,
    ) -> None:
        """``output_lengths``: what is known of answers' lengths; whoever learns it shares it."""
        self._output_lengths = output_lengths or OutputLengthEstimator()
        self._on_start = on_start
        self._links = links or LinkMatrix()
        self._placement = placement
        self._limits = limits or LadderLimits()
        self._fetch = fetch or FetchPolicy()
        self._registry = registry
        self._router = FleetRouter(registry.fleet, prefix_index)
        self._block_key = block_key
        self._receipts = receipts
        self._clock = clock
        self._runs: dict[str, Run] = {}

    @property
    def num_running(self) -> int:
        return len(self._runs)

    @property
    def num_waiting(self) -> int:
        """Requests that no worker could take yet."""
        return sum(run.ladder.is_waiting for run in self._runs.values())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See Dispatcher. Tokens have gap-free indices from 0, whatever workers they came from."""
        run = self._open(request)
        try:
            while run.end is None:
                for delta in await self._advance(run):
                    # Only with the last one: several may come at once, and the caller may stop at one before it.
                    if delta.finish_reason is not None and run.end is not None:
                        self._receipts.end(run.record, _outcome(run.request, run.end.outcome))
                    yield delta
            self._receipts.end(run.record, _outcome(run.request, run.end.outcome))
            if run.end.error is not None:
                raise run.end.error
        except Exception:
            run.own_end = "error"  # our own: the ladder's errors have ended it
            raise
        finally:
            run.stop_timer()
            run.arrivals.take = None
            self._runs.pop(request.request_id, None)
            self._do(run, run.ladder.on_cancel(run.own_end))
            self._receipts.end(run.record, run.own_end)

    def finish(self, request: GenerationRequest, reason: str, num_tokens: int) -> None:
        """The API layer ends the request itself, at a stop string: that is its outcome, not the cancellation after it, and
        tokens that came together with the last that counted are nobody's."""
        run = self._runs.get(request.request_id)
        if run is not None:
            run.own_end = reason
            run.record.completion_tokens = num_tokens
            run.record.trace.mark(Instant.ENDED, self._clock())
            self._receipts.end(run.record, reason)

    def _open(self, request: GenerationRequest) -> Run:
        deadline_s = None if request.timeout_s is None else self._clock() + request.timeout_s
        ladder = Ladder(
            request.prompt_token_ids,
            max_tokens=request.sampling.max_tokens,
            deadline_s=deadline_s,
            placement=self._placement,
            limits=self._limits,
        )
        record = self._receipts.open(request)
        record.attempts, record.fallbacks = ladder.attempts, ladder.fallbacks
        run = self._runs[request.request_id] = Run(request, record, ladder, deadline_s, self._clock)
        run.arrivals.take = run.take
        self._on_start()
        return run

    # Events to the ladder.

    async def _advance(self, run: Run) -> list[TokenDelta]:
        """One event: the workers that there are, an arrival, or the passing of time. Returns what is new for the client."""
        ladder = run.ladder
        if not ladder.wants_workers:
            arrival = await self._arrival(run)
            if arrival is None:
                return self._do(run, ladder.on_time(max(self._clock(), ladder.wake_s)))
            deltas = self._on_arrival(run, arrival)
            if ladder.wants_workers:
                self._log_failure(run)
            return deltas
        now_s = self._clock()
        if now_s < ladder.wake_s and not await self._changed(ladder.wake_s):
            now_s = ladder.wake_s
        commands = ladder.on_workers(
            lambda wish: self._choose(run, wish), self._registry.alive, max(self._clock(), now_s)
        )
        return self._do(run, commands)

    def _on_arrival(self, run: Run, arrival: Arrival) -> list[TokenDelta]:
        ladder, incarnation = run.ladder, arrival.link.incarnation
        if (row := arrival.tokens) is not None:
            delta = plain_delta(row)
            if not run.take_next(arrival, row):
                return self._do(run, ladder.on_output(arrival.attempt, incarnation, PartOutput(delta), self._clock()))
            return [delta if run.has_told_cached_tokens else self._with_cached_tokens(run, delta)]
        now_s = self._clock()
        if arrival.failure is not None:
            return self._do(run, ladder.on_lost(arrival.attempt, incarnation, arrival.failure, now_s))
        assert arrival.output is not None
        output = part_output(arrival.output)
        if (arrival.attempt, incarnation) in run.links:
            self._note(run, arrival.output)
            if (pair := _pair(ladder.attempts[-1])) is not None and blames_link(output.error):
                self._links.on_failure(pair, now_s)
        return self._do(run, ladder.on_output(arrival.attempt, incarnation, output, now_s))

    async def _arrival(self, run: Run) -> Arrival | None:
        """The next arrival, or None when it is time for the ladder first.

        One timer for as long as the ladder's time stays the same: one for each token would cost more than the token.
        """
        while True:
            wake_s = run.ladder.wake_s
            if run.arrivals.empty() and wake_s != run.timer_s and not math.isinf(wake_s):
                run.stop_timer()
                run.timer_s = wake_s
                delay_s = max(0.0, wake_s - self._clock())
                run.timer = asyncio.get_running_loop().call_later(delay_s, run.arrivals.put_nowait, None)
            arrival = await run.arrivals.get()
            if arrival is not None:
                return arrival
            is_due = run.timer_s == wake_s
            run.stop_timer()
            if is_due:
                return None

    async def _changed(self, wake_s: float) -> bool:
        """Whether the workers changed before it was time."""
        try:
            async with asyncio.timeout(None if math.isinf(wake_s) else wake_s - self._clock()):
                await self._registry.wait_changed()
        except TimeoutError:
            return False
        return True

    def _choose(self, run: Run, wish: Wish) -> RoutingDecision:
        """The router's answer. Raises BatonError when no worker can take the request."""
        compatibility, now_s = self._registry.compatibility(), self._clock()
        layout = pb.KVLayout() if compatibility is None else compatibility.layout
        if compatibility is not None and not run.block_names:
            namer = BlockNamer(self._block_key, compatibility.model_fingerprint)
            run.block_names = namer.names(run.request.prompt_token_ids, layout.block_size, run.request.cache_salt)
        run.block_size = layout.block_size or run.block_size
        routed = RoutedRequest(
            request_id=run.request.request_id,
            num_tokens=len(run.request.prompt_token_ids) + len(run.ladder.token_ids),
            block_size=run.block_size,
            block_bytes=block_bytes(layout),
            cached_blocks={},  # the router looks the names up
            excluded=wish.excluded,
            excluded_pairs=wish.excluded_pairs,
            preferred=wish.preferred,
            fetch=self._fetch,
            ttft_target_s=_left_s(run.record, now_s),
            tpot_target_s=_seconds(run.record.slo_tpot_ms),
            answer=self._expected_answer(run) if wish.placement is Placement.AUTO else None,
        )
        assert self._registry.fleet is self._router.fleet  # and is up to date now
        return self._router.route(routed, run.block_names, wish.placement, self._links, now_s)

    def _expected_answer(self, run: Run) -> Answer:
        num_there, max_tokens = len(run.ladder.token_ids), run.request.sampling.max_tokens
        num_expected = self._output_lengths.expected(max_tokens, num_there)
        return Answer(max(1, num_expected - num_there), max_tokens - num_there)

    # Commands of the ladder.

    def _do(self, run: Run, commands: Sequence[Command]) -> list[TokenDelta]:
        """Carries commands out, except for what it returns: the caller passes that on, and may be closed meanwhile."""
        deltas = []
        for command in commands:
            match command:
                case Start():
                    self._start(run, command)
                case Release():
                    link = run.links.pop((command.attempt, command.incarnation))
                    link.release((run.request.request_id, command.attempt), cancel=command.cancel)
                    if run.fetching is not None and run.fetching.decode == command.incarnation:
                        self._links.on_fetch_over(run.fetching, self._clock())
                        run.fetching = None
                    if command.cancel and (pair := _pair(run.ladder.attempts[command.attempt - 1])) is not None:
                        self._links.on_over(pair, self._clock())
                case Emit(delta):
                    if delta.tokens:
                        run.request.trace.mark(Instant.FIRST_TOKEN, self._clock())
                        if run.record.completion_tokens == 1:
                            run.record.second_token_s = self._clock()
                    run.record.completion_tokens += len(delta.tokens)
                    deltas.append(self._with_cached_tokens(run, delta))
                case End():
                    run.end = command
                    run.record.trace.mark(Instant.ENDED, self._clock())
        return deltas

    def _with_cached_tokens(self, run: Run, delta: TokenDelta) -> TokenDelta:
        """The first delta tells what is known then, and the first after that changed tells it again."""
        cached_tokens = run.record.cached_tokens
        told = cached_tokens if cached_tokens != run.told_cached_tokens else None
        run.told_cached_tokens = cached_tokens
        return delta if delta.cached_tokens == told else replace(delta, cached_tokens=told)

    def _start(self, run: Run, command: Start) -> None:
        request, chosen, number = run.request, command.attempt.decision.chosen, command.attempt.number
        run.sent_s = self._clock()
        run.is_from_start = len(command.token_ids) == len(request.prompt_token_ids)
        run.request.trace.mark(Instant.ROUTED, run.sent_s)
        decode = self._link(run, number, chosen.decode)
        prefill = None if chosen.prefill is None else self._link(run, number, chosen.prefill)
        if (pair := _pair(command.attempt)) is not None:
            self._links.on_start(pair, run.sent_s)
        spec = pb.GenerationSpec(
            request_id=request.request_id,
            attempt=number,
            token_ids=command.token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=convert.sampling_to_wire(request.sampling),
            cache_salt=request.cache_salt,
            deadline_ms=0 if run.deadline_s is None else max(1, int((run.deadline_s - run.sent_s) * 1e3)),
            service=convert.service_to_wire(request.service_level(run.sent_s), run.sent_s),
            session=convert.session_to_wire(request.session),
        )
        fetch = self._fetch_source(chosen.fetch)
        run.fetching = None
        if fetch is not None:
            run.fetching = PairKey(fetch.holder.incarnation, (prefill or decode).incarnation)
            self._links.on_fetch_start(run.fetching, run.sent_s)
        tpot_target_s = _seconds(run.record.slo_tpot_ms)
        # The decode worker first: it then knows of the handoff when the prefill worker asks it for slots.
        if chosen.decode.role is Role.PREFILL:
            decode.start(prefill_pb2.Start(spec=spec, fetch=fetch), run.arrivals, tpot_target_s)
            return
        if prefill is None:
            decode.start(decode_pb2.Start(spec=spec, fetch=fetch), run.arrivals, tpot_target_s)
            return
        decode.start(decode_pb2.Start(spec=spec, prefill=prefill.identity), run.arrivals, tpot_target_s)
        prefill.start(
            prefill_pb2.Start(spec=spec, decode=decode.identity, decode_address=chosen.decode.address, fetch=fetch),
            run.arrivals,
        )

    def _fetch_source(self, plan: FetchPlan | None) -> pb.FetchSource | None:
        holder = None if plan is None else self._registry.get(plan.holder_id)
        if plan is None or holder is None:
            return None
        return pb.FetchSource(
            holder=holder.link.identity,
            address=holder.link.address,
            num_blocks=plan.num_blocks,
            patience_ms=max(1, round(plan.patience_s * 1e3)),
        )

    def _link(self, run: Run, attempt: int, view: WorkerView) -> WorkerLink:
        known = self._registry.get(view.worker_id)
        assert known is not None  # the views are the registry's, and nothing was awaited since
        assert known.link.incarnation == view.incarnation
        run.links[attempt, view.incarnation] = known.link
        return known.link

    def _note(self, run: Run, output: pb.RequestOutput) -> None:
        """Takes the workers' own measurements into trace and receipt."""
        trace, record = run.request.trace, run.record
        if output.HasField("prefill"):
            start_s = run.sent_s + output.prefill.queue_ms / 1e3
            trace.mark(Instant.PREFILL_START, start_s)
            trace.mark(Instant.PREFILL_END, start_s + output.prefill.prefill_ms / 1e3)
            if run.is_from_start:  # what a later attempt finds is, in part, this request's own
                record.cached_tokens = output.prefill.cached_tokens
                record.computed_tokens = record.prompt_tokens - output.prefill.cached_tokens
        if output.HasField("transfer"):
            record.transfer = report = output.transfer
            trace.mark(Instant.TRANSFER_END, self._clock())
            if run.is_from_start:  # the decode worker may have had more of the prompt than its prefill worker
                size = run.block_size
                num_there = min(output.transfer.num_blocks_skipped, (record.prompt_tokens - 1) // size)
                record.cached_tokens = max(record.cached_tokens, num_there * size)
            record.fallbacks.extend(OTHER_TRANSPORT for _ in report.fallbacks)
            if (pair := _pair(run.ladder.attempts[-1])) is not None:
                self._links.on_transfer(pair, report.transport, report.num_bytes, report.duration_ms, self._clock())
        if output.HasField("fetch"):
            record.fetch = output.fetch
            self._note_fetch(run, output.fetch)

    def _note_fetch(self, run: Run, report: pb.FetchReport) -> None:
        chosen = run.ladder.attempts[-1].decision.chosen
        is_failed = report.HasField("error")
        if is_failed:
            run.ladder.fallbacks.append(FETCH_FAILED)
        pair, run.fetching = run.fetching, None
        if chosen.fetch is None or pair is None:
            return
        if is_failed:
            self._links.on_fetch_failed(pair, report.error.code, self._clock())
        else:
            self._links.on_fetched(pair, report.transport, report.num_bytes, report.duration_ms, self._clock())
            self._fetch = self._fetch.learned(chosen.fetch, report.duration_ms / 1e3)

    def _log_failure(self, run: Run) -> None:
        attempt, error = run.ladder.attempts[-1], run.ladder.failure
        log.warning(
            "attempt failed, trying again",
            request_id=run.request.request_id,
            attempt=attempt.number,
            code=attempt.outcome,
            cause=error.message if error else "",
        )


def _pair(attempt: Attempt) -> PairKey | None:
    """The pair that an attempt's blocks travel between."""
    chosen = attempt.decision.chosen
    return None if chosen.prefill is None else PairKey(chosen.prefill.incarnation, chosen.decode.incarnation)


def _seconds(target_ms: float | None) -> float | None:
    return None if target_ms is None else target_ms / 1e3


def _left_s(record: GenerationRecord, now_s: float) -> float | None:
    """Of the time to the first token that was promised."""
    target_s, received_s = _seconds(record.slo_ttft_ms), record.trace.at(Instant.RECEIVED)
    return target_s if target_s is None or received_s is None else max(0.0, target_s - (now_s - received_s))


def _outcome(request: GenerationRequest, outcome: str) -> str:
    return request.stop_means if outcome == "stop" else outcome
