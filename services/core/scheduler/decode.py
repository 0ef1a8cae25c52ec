"""The decode pool's policy: continuous batching, admission of what can also grow, preemption by recompute.

A request comes with its blocks still to be received (``reserve``, then ``commit``) or with a prompt to be computed here
(``add``); a colocated worker is this scheduler alone.

    WAITING -> AWAITING_KV -> RUNNING -> FINISHED        reserve .. granted .. commit
    WAITING ----------------> RUNNING -> FINISHED        add .. admitted
    WAITING <---------------- RUNNING                    preempted: computed again from its tokens, mostly prefix hits

Why this cannot get stuck. Requests that run are ranked, and a rank does not change while they run: the most urgent first,
batch last. Only the last one is ever preempted for another's growth, and never the first: that gets every block that it
needs, as soon as no transfer holds it, and every transfer ends (by commit, abort or lease). The queue is served in order
too (``waiting``), so its head gets the room that it waits for. Batch gives its seats and blocks to whoever waits for them in
front of it, until its patience is over: then it is ranked like the others.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, Request, RequestState, SampledToken
from baton.services.core.scheduler.base import (
    RequestUpdate,
    Reservation,
    ScheduledRequest,
    SchedulerLimits,
    SchedulerOutput,
    SchedulerStats,
    StepResult,
)
from baton.services.core.scheduler.block_tables import BlockTables, Sequence
from baton.services.core.scheduler.cache_moves import CacheMoves
from baton.services.core.scheduler.chunking import share_by_rank
from baton.services.core.scheduler.fairness import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST
from baton.services.core.scheduler.finish import append_token, check_can_be_served, ends_with_next_token, max_kv_tokens
from baton.services.core.scheduler.generating import Generating
from baton.services.core.scheduler.growth import GrowthPromises
from baton.services.core.scheduler.incoming import IncomingHandoffs, IncomingState
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.scheduler.pace import Handoffs, Pace, prompt_budget
from baton.services.core.scheduler.room import Room, RoomFinder
from baton.services.core.scheduler.waiting import Patience, WaitingQueue, is_yielding, merged, rank, tokens_left


class DecodeScheduler:
    """Running requests first, one token each; then prompts in progress; then the queue, as far as there is room."""

    def __init__(
        self,
        pool: BlockPool,
        namer: BlockNamer,
        limits: SchedulerLimits,
        *,
        output_lengths: OutputLengthEstimator | None = None,
        enable_prefix_caching: bool = True,
        pace: Pace | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.moves = CacheMoves(pool, limits.transfer_lease_s)
        self.output_lengths = output_lengths or OutputLengthEstimator()
        self._tables = BlockTables(pool, namer, enable_prefix_caching=enable_prefix_caching)
        self._incoming = IncomingHandoffs(pool, self._tables, limits.transfer_lease_s)
        growth = GrowthPromises(self._tables, self.output_lengths, limits.max_model_len)
        self._room = RoomFinder(self._tables, growth, self._incoming, limits)
        self._sequences: dict[str, Sequence] = {}  # everything that has not ended
        self._pace = pace or Pace()
        self._queue = WaitingQueue(self._pace, patience or Patience(), self._cost)  # prompts and reservations
        max_model_len = limits.max_model_len
        self._generating = Generating(self._tables, self._queue, self.output_lengths, max_model_len, self._end)
        self._handoffs = Handoffs()
        self._awaiting: dict[str, Sequence] = {}  # granted, their blocks still to arrive
        self._running: list[Sequence] = []  # most urgent first
        self._num_added = 0
        self._num_preemptions = 0
        self._now = 0.0  # of the last step

    # Requests in and out

    @property
    def has_work(self) -> bool:
        return bool(self._running or len(self._queue) or self._awaiting)

    def add(self, request: Request) -> None:
        """Queue a prompt to be computed here. Raises BatonError for a request that could never run to its end here."""
        self._enqueue(request)

    def reserve(self, request: Request, block_names: list[bytes], now: float) -> Reservation | None:
        """Ask for the blocks of a prompt that another worker computes.

        None: no room yet; it waits in the queue and comes out of a later ``schedule``. Raises BatonError where it can
        never be granted, and where ``block_names`` are not what this worker calls the request's blocks.

        A sender asks only when its own scheduler has admitted the prompt, so that what is granted will surely be filled:
        otherwise two workers could each wait for room that the other's requests hold.
        """
        sequence = self._enqueue(request, computes=False)
        try:
            if self.block_names(request.request_id) != block_names:
                raise BatonError(
                    ErrorCode.INCOMPATIBLE,
                    f"the sender's names of the {len(block_names)} blocks of request {request.request_id} differ from this "
                    "worker's: their models, block sizes, salts or name keys are not the same",
                )
            if ends_with_next_token(request, self.limits.max_model_len):
                raise BatonError(
                    ErrorCode.HANDOFF_FAILED,
                    f"request {request.request_id} ends with its first token, so that there is nothing to hand over",
                )
            self._incoming.open(sequence, now)
            self._handoffs.on_announced(request.service.tpot_s, now)
        except BatonError:
            del self._sequences[request.request_id]
            self._queue.remove(request.request_id)
            raise
        # Only this one: those before it that have room too come out of ``schedule``, where their callers look for them.
        if sequence in self._look_for_room(now).found:
            return self._grant(sequence, now)
        return None

    def commit(self, request_id: str, first_token: SampledToken, now: float, attempt: int | None = None) -> Request:
        """The blocks have arrived and were verified: they become the request's, which runs on behind ``first_token``.

        Raises BatonError where there is no such reservation (any more); blocks that the transfer still held are free then.
        """
        sequence = self._sequences.get(request_id)
        incoming = self._incoming.of(sequence) if sequence and attempt in (None, sequence.request.attempt) else None
        if sequence is None or incoming is None or incoming.state is not IncomingState.GRANTED:
            self.abort_reservation(request_id, writes_quiet=True, now=now, attempt=attempt)
            raise BatonError(ErrorCode.HANDOFF_FAILED, f"request {request_id} waits for no blocks here (any more)")
        request = sequence.request
        del self._awaiting[request_id]
        self._incoming.commit(incoming)
        request.state = RequestState.RUNNING
        insort(self._running, sequence, key=rank)
        sequence.has_sampled = True
        if (reason := append_token(request, first_token.token_id, self.limits.max_model_len)) is not None:
            self._end(sequence, FinishReason.ERROR)
            raise BatonError(
                ErrorCode.HANDOFF_FAILED,
                f"request {request_id} was handed over although its first token ends it ({reason})",
            )
        self._handoffs.on_begun(request.service.tpot_s, now)
        return request

    def abort_reservation(
        self,
        request_id: str,
        *,
        writes_quiet: bool,
        now: float,
        attempt: int | None = None,
        verified: Iterable[int] = (),
    ) -> Request | None:
        """The transfer has ended without a commit. Ends the request if it still waits for it, and returns it then.

        ``writes_quiet``: no write can land any more, so the blocks are free at once; otherwise they stay in quarantine
        until ``release_quarantine``. What was ``verified``, by index in the prompt, becomes prefix cache. Idempotent.
        """
        ended = None
        for incoming in self._incoming.find(request_id, attempt):
            if self._incoming.of(incoming.sequence) is incoming:
                ended = incoming.sequence.request
                self._end(incoming.sequence, FinishReason.ABORT)
            self._incoming.let_go(incoming, writes_quiet=writes_quiet, now=now, verified=verified)
        return ended

    def release_quarantine(self, request_id: str, attempt: int | None = None) -> None:
        """No write can land any more in what an aborted reservation left. Idempotent."""
        for incoming in self._incoming.find(request_id, attempt):
            self._incoming.release_quarantine(incoming)

    def renew_lease(self, request_id: str, attempt: int, now: float) -> None:
        """The transfer is alive: its blocks are overdue only after another lease."""
        self._incoming.renew(request_id, attempt, now)

    def abort(self, request_id: str) -> Request | None:
        """End a request in any state. Blocks that a transfer fills stay the transfer's until ``abort_reservation``."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._end(sequence, FinishReason.ABORT)
        return sequence.request

    def phase(self, request_id: str) -> str | None:
        """Where a request stands that has not ended; None for others."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else sequence.request.state.value

    def block_names(self, request_id: str) -> list[bytes]:
        """Names of the request's blocks as it came, full ones, then a partial one. KeyError for one that is not here."""
        return self._sequences[request_id].initial_names

    def room_for_moves(self) -> int:
        """Blocks that moves of cached ones may take: not those promised, nor those that the first in the queue waits for."""
        room = self._room.unpromised(self._running, self._awaiting.values())
        first = self._queue.first(self._now)
        return room - (0 if first is None else self._room.plan(first).num_taken)

    def stats(self) -> SchedulerStats:
        own = [sequence for sequence in self._sequences.values() if self._incoming.of(sequence) is None]
        prefilling = [sequence for sequence in own if sequence.request.is_prefilling]
        return SchedulerStats(
            queued=len(self._queue),
            running=len(self._running),
            queued_tokens=tokens_left(prefilling),
            batch_queued_tokens=tokens_left(filter(is_yielding, prefilling)),
            awaiting_kv=len(self._awaiting),
            preemptions_total=self._num_preemptions,
        )

    # Steps

    def schedule(self, now: float) -> SchedulerOutput:
        self._now = now
        expired = self._expire(now)
        yielded = self._make_way(now)
        decodes, preempted = self._schedule_decodes(now)
        budget = prompt_budget(self.limits, self._pace, decodes, self.pool.block_size, self._handoffs, now)

        # What was just taken from one request is not for another, unless it was taken for that one.
        arrivals = [] if preempted else self._look_for_room(now).found
        if yielded:
            arrivals = [sequence for sequence in arrivals if not is_yielding(sequence)]
        prompts = [sequence for sequence in arrivals if self._incoming.of(sequence) is None]
        prefilling = [sequence for sequence in self._running if sequence.request.is_prefilling]
        candidates = merged(prefilling, prompts)
        remaining = [(self._tables.num_left(sequence), is_yielding(sequence)) for sequence in candidates]
        shares = dict(zip(candidates, share_by_rank(remaining, budget, self.limits.short_prompt_share), strict=True))
        scheduled = decodes + [ScheduledRequest(s.request, shares[s]) for s in prefilling if shares[s]]
        granted: list[Reservation] = []
        for sequence in arrivals:
            if sequence not in shares:
                if reservation := self._grant(sequence, now):
                    granted.append(reservation)
            elif shares[sequence] and self._admit(sequence, now):
                num_tokens = min(shares[sequence], sequence.request.num_uncomputed_tokens)
                scheduled.append(ScheduledRequest(sequence.request, num_tokens))
        return SchedulerOutput(scheduled, yielded + preempted, granted, expired)

    def update(self, output: SchedulerOutput, result: StepResult, now: float) -> list[RequestUpdate]:
        num_decodes = sum(not item.request.is_prefilling for item in output.scheduled)
        self._pace.observe(now - self._now, output.num_tokens - num_decodes, num_decodes)
        return [
            self._generating.advance(sequence, item, result, now)
            for item in output.scheduled
            if (sequence := self._sequences.get(item.request.request_id)) and sequence.request is item.request
        ]

    def _make_way(self, now: float) -> list[Request]:
        """Batch gives its seats and blocks up as soon as somebody in front of it waits for them."""
        yielded: list[Request] = []
        while self._running and is_yielding(self._running[-1]):
            blocked = self._look_for_room(now).blocked
            if blocked is None or is_yielding(blocked):
                break
            yielded.append(self._running[-1].request)
            self._preempt(self._running[-1])
        return yielded

    def _schedule_decodes(self, now: float) -> tuple[list[ScheduledRequest], list[Request]]:
        """One token for each request that has only that to compute, making room for it where it needs a block."""
        decodes: list[ScheduledRequest] = []
        preempted, index = list[Request](), 0
        while index < len(self._running):
            sequence = self._running[index]
            request = sequence.request
            if not request.is_prefilling and self._make_room(sequence, preempted):
                if request.first_scheduled_s is None:
                    request.first_scheduled_s = now
                decodes.append(ScheduledRequest(request, 1))
            index += 1
        return decodes, preempted

    def _make_room(self, sequence: Sequence, preempted: list[Request]) -> bool:
        """Blocks for the next token. May preempt newer requests, and this one if there is none newer but an older."""
        num_missing = self._tables.num_missing(sequence.request, 1)
        while num_missing > self.pool.num_available:
            victim = self._running[-1]
            if victim is self._running[0]:
                return False  # alone: transfers or quarantine hold the rest, and will let go
            self._preempt(victim)
            preempted.append(victim.request)
            if victim is sequence:
                return False
        if num_missing:
            self._tables.grow(sequence, num_missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        request = sequence.request
        self._running.remove(sequence)
        self._tables.free(sequence)
        sequence.prompt_logprobs.clear()
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self._num_preemptions += 1
        self._queue.push_back(sequence)

    def _look_for_room(self, now: float) -> Room:
        return self._room.find(self._queue.in_order(now), self._running, self._awaiting.values())

    def _grant(self, sequence: Sequence, now: float) -> Reservation | None:
        plan, incoming = self._room.plan(sequence), self._incoming.of(sequence)
        # Those admitted just before may have evicted a prefix that was counted on.
        if incoming is None or plan.num_taken > self.pool.num_available:
            return None
        request = sequence.request
        self._queue.take(sequence, 0)
        self._awaiting[request.request_id] = sequence
        request.state = RequestState.AWAITING_KV
        return self._incoming.grant(incoming, plan, now)

    def _admit(self, sequence: Sequence, now: float) -> bool:
        plan = self._room.plan(sequence)
        if plan.num_taken > self.pool.num_available:
            return False
        request = sequence.request
        self._tables.admit(sequence, plan)
        self._queue.take(sequence, request.num_uncomputed_tokens)
        insort(self._running, sequence, key=rank)
        request.state = RequestState.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now
        return True

    def _cost(self, sequence: Sequence) -> float:
        """What a request that waits will probably cost its tenant."""
        request = sequence.request
        num_output = self.output_lengths.expected(request.sampling.max_tokens, request.num_output_tokens)
        num_prompt = request.num_uncomputed_tokens if self._incoming.of(sequence) is None else 0
        return PROMPT_TOKEN_COST * num_prompt + OUTPUT_TOKEN_COST * num_output

    # Ends

    def _enqueue(self, request: Request, *, computes: bool = True) -> Sequence:
        if request.request_id in self._sequences:
            raise BatonError(ErrorCode.INVALID_REQUEST, f"request {request.request_id} is already on this worker")
        max_model_len = self.limits.max_model_len
        check_can_be_served(request, self.pool, max_model_len, max_kv_tokens(request, max_model_len))
        sequence = self._tables.open(request, self._num_added)
        self._num_added += 1
        self._sequences[request.request_id] = sequence
        self._queue.push(sequence, computes=computes)
        return sequence

    def _expire(self, now: float) -> list[Request]:
        """Ends what waits, in the queue or for its blocks, and is worth nothing any more."""
        waiting = (*self._queue.values(), *self._awaiting.values())
        late = [s for s in waiting if s.request.deadline_s is not None and s.request.deadline_s <= now]
        for sequence in late:
            self._end(sequence, FinishReason.ERROR)
        return [sequence.request for sequence in late]

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        request = sequence.request
        incoming = self._incoming.of(sequence)
        del self._sequences[request.request_id]
        self._queue.remove(request.request_id)
        self._awaiting.pop(request.request_id, None)
        if request.state is RequestState.RUNNING:
            self._running.remove(sequence)
        self._tables.free(sequence)
        if incoming is not None:
            self._incoming.orphan(incoming)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
