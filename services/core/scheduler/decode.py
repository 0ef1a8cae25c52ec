"""The decode pool's policy: continuous batching, admission of what can also grow, preemption by recompute.

A request comes with its blocks still to be received (``reserve``, then ``commit``) or with a prompt to be computed here
(``add``); a colocated worker is this scheduler alone.

    WAITING -> AWAITING_KV -> RUNNING -> FINISHED        reserve .. granted .. commit
    WAITING ----------------> RUNNING -> FINISHED        add .. admitted
    WAITING <---------------- RUNNING                    preempted: computed again from its tokens, mostly prefix hits

Why this cannot get stuck. Requests are ordered by arrival. Only the newest running one is ever preempted, and never the
last: the oldest gets every block that it needs, as soon as no transfer holds it, and every transfer ends (by commit,
abort or lease). The queue is served in order too, so the head gets the room that it waits for.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
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
from baton.services.core.scheduler.block_tables import BlockTables, Plan, Sequence
from baton.services.core.scheduler.cache_moves import CacheMoves
from baton.services.core.scheduler.chunking import share_tokens
from baton.services.core.scheduler.finish import append_token, check_can_be_served, ends_with_next_token, max_kv_tokens
from baton.services.core.scheduler.growth import GrowthPromises
from baton.services.core.scheduler.incoming import IncomingHandoffs, IncomingState
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.scheduler.progress import prefill_info, record_chunk

# Queued prompts that one step looks at; so many cannot all get tokens in it anyway.
MAX_LOOKAHEAD = 16


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
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.moves = CacheMoves(pool, limits.transfer_lease_s)
        self.output_lengths = output_lengths or OutputLengthEstimator()
        self._tables = BlockTables(pool, namer, enable_prefix_caching=enable_prefix_caching)
        self._growth = GrowthPromises(self._tables, self.output_lengths, limits.max_model_len)
        self._incoming = IncomingHandoffs(pool, self._tables, limits.transfer_lease_s)
        self._sequences: dict[str, Sequence] = {}  # everything that has not ended
        self._queue: OrderedDict[str, Sequence] = OrderedDict()  # prompts and reservations, in order
        self._awaiting: dict[str, Sequence] = {}  # granted, their blocks still to arrive
        self._running: list[Sequence] = []  # oldest first
        self._num_added = 0
        self._num_preemptions = 0

    # Requests in and out

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._queue or self._awaiting)

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
        sequence = self._enqueue(request)
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
        except BatonError:
            del self._sequences[request.request_id], self._queue[request.request_id]
            raise
        # Only this one: those before it that have room too come out of ``schedule``, where their callers look for them.
        if sequence in self._find_room():
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
        insort(self._running, sequence, key=lambda running: running.order)
        sequence.has_sampled = True
        if (reason := append_token(request, first_token.token_id, self.limits.max_model_len)) is not None:
            self._end(sequence, FinishReason.ERROR)
            raise BatonError(
                ErrorCode.HANDOFF_FAILED,
                f"request {request_id} was handed over although its first token ends it ({reason})",
            )
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
        """Blocks that may be taken to bring cached ones here: not those promised to what runs, nor those that the first in
        the queue waits for."""
        room = self.pool.num_available - self._growth.outstanding(self._running, self._awaiting.values())
        first = next(iter(self._queue.values()), None)
        return room - (0 if first is None else self._plan(first).num_taken)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            queued=len(self._queue),
            running=len(self._running),
            queued_tokens=sum(
                sequence.request.num_uncomputed_tokens
                for sequence in self._sequences.values()
                if sequence.request.is_prefilling and self._incoming.of(sequence) is None
            ),
            awaiting_kv=len(self._awaiting),
            preemptions_total=self._num_preemptions,
        )

    # Steps

    def schedule(self, now: float) -> SchedulerOutput:
        expired = self._expire(now)
        decodes, preempted = self._schedule_decodes(now)
        budget = self.limits.max_num_batched_tokens - len(decodes)
        if decodes and self.limits.max_interleaved_prefill_tokens is not None:
            budget = min(budget, self.limits.max_interleaved_prefill_tokens)

        # What was just taken from one request is not for another.
        arrivals = [] if preempted else self._find_room()
        prompts = [sequence for sequence in arrivals if self._incoming.of(sequence) is None]
        prefilling = [sequence for sequence in self._running if sequence.request.is_prefilling]
        remaining = [sequence.request.num_uncomputed_tokens for sequence in prefilling]
        remaining += [self._tables.num_to_compute(sequence) for sequence in prompts]
        shares = dict(
            zip(prefilling + prompts, share_tokens(remaining, budget, self.limits.short_prompt_share), strict=True)
        )
        scheduled = decodes + [ScheduledRequest(s.request, shares[s]) for s in prefilling if shares[s]]
        granted: list[Reservation] = []
        for sequence in arrivals:
            if sequence not in shares:
                if reservation := self._grant(sequence, now):
                    granted.append(reservation)
            elif shares[sequence] and self._admit(sequence, now):
                num_tokens = min(shares[sequence], sequence.request.num_uncomputed_tokens)
                scheduled.append(ScheduledRequest(sequence.request, num_tokens))
        return SchedulerOutput(scheduled, preempted, granted, expired)

    def update(self, output: SchedulerOutput, result: StepResult, now: float) -> list[RequestUpdate]:
        return [
            self._advance(sequence, item, result, now)
            for item in output.scheduled
            if (sequence := self._sequences.get(item.request.request_id)) and sequence.request is item.request
        ]

    def _schedule_decodes(self, now: float) -> tuple[list[ScheduledRequest], list[Request]]:
        """One token for each request that has only that to compute, making room for it where it needs a block."""
        decodes: list[ScheduledRequest] = []
        preempted: list[Request] = []
        index = 0
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
        self._queue[request.request_id] = sequence
        self._queue.move_to_end(request.request_id, last=False)

    def _find_room(self) -> list[Sequence]:
        """The head of the queue, as far as there is room for it to come and to grow. Takes nothing yet.

        In order: behind one that has no room nobody has, or the long would starve.
        """
        found: list[Sequence] = []
        num_prompts = 0
        num_active = len(self._running) + len(self._awaiting)
        room = self.pool.num_available - self._growth.outstanding(self._running, self._awaiting.values())
        for sequence in self._queue.values():
            if num_active + len(found) >= self.limits.max_num_seqs or num_prompts >= MAX_LOOKAHEAD:
                break
            plan = self._plan(sequence)
            num_blocks = len(plan.hits) + plan.num_new
            sequence.promised_blocks = max(num_blocks, self._growth.promise(sequence.request))
            growth = sequence.promised_blocks - num_blocks
            # Alone it may have everything: there is nobody whom it could drive out.
            is_alone = num_active + len(found) == 0
            if plan.num_taken + (0 if is_alone else growth) > room:
                break
            room -= plan.num_taken + growth
            num_prompts += self._incoming.of(sequence) is None
            found.append(sequence)
        return found

    def _plan(self, sequence: Sequence) -> Plan:
        """A reservation may find all its full blocks here; a prompt has to compute its last token."""
        if self._incoming.of(sequence) is None:
            return self._tables.plan(sequence)
        return self._tables.plan(sequence, num_hits=sequence.request.num_tokens // self.pool.block_size)

    def _grant(self, sequence: Sequence, now: float) -> Reservation | None:
        plan, incoming = self._plan(sequence), self._incoming.of(sequence)
        # Those admitted just before may have evicted a prefix that was counted on.
        if incoming is None or plan.num_taken > self.pool.num_available:
            return None
        request = sequence.request
        del self._queue[request.request_id]
        self._awaiting[request.request_id] = sequence
        request.state = RequestState.AWAITING_KV
        return self._incoming.grant(incoming, plan, now)

    def _admit(self, sequence: Sequence, now: float) -> bool:
        plan = self._plan(sequence)
        if plan.num_taken > self.pool.num_available:
            return False
        request = sequence.request
        del self._queue[request.request_id]
        self._tables.admit(sequence, plan)
        insort(self._running, sequence, key=lambda running: running.order)
        request.state = RequestState.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = now
        return True

    # Ends

    def _advance(self, sequence: Sequence, item: ScheduledRequest, result: StepResult, now: float) -> RequestUpdate:
        request = sequence.request
        samples = item.samples
        record_chunk(sequence, item, result)
        completed = self._tables.complete(sequence)
        completed_ids = tuple(request.block_table[completed.start : completed.stop])
        first_index = request.num_output_tokens
        if not samples:
            return RequestUpdate(
                request, (), first_index, completed_blocks=completed, completed_block_ids=completed_ids
            )
        token = result.sampled[request.request_id]
        is_first = not sequence.has_sampled
        sequence.has_sampled = True
        reason = append_token(request, token.token_id, self.limits.max_model_len)
        if reason is not None:
            self.output_lengths.observe(request.num_output_tokens)
            self._end(sequence, reason)
        return RequestUpdate(
            request,
            new_tokens=(token,),
            first_index=first_index,
            finished=reason is not None,
            completed_blocks=completed,
            completed_block_ids=completed_ids,
            prefill=prefill_info(sequence, now) if is_first else None,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and sequence.prompt_logprobs else None,
        )

    def _enqueue(self, request: Request) -> Sequence:
        if request.request_id in self._sequences:
            raise BatonError(ErrorCode.INVALID_REQUEST, f"request {request.request_id} is already on this worker")
        max_model_len = self.limits.max_model_len
        check_can_be_served(request, self.pool, max_model_len, max_kv_tokens(request, max_model_len))
        sequence = self._tables.open(request, self._num_added)
        self._num_added += 1
        self._sequences[request.request_id] = self._queue[request.request_id] = sequence
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
        self._queue.pop(request.request_id, None)
        self._awaiting.pop(request.request_id, None)
        if request.state is RequestState.RUNNING:
            self._running.remove(sequence)
        self._tables.free(sequence)
        if incoming is not None:
            self._incoming.orphan(incoming)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
