"""The prefill pool's policy: compute prompts in chunks, then hold their blocks until the receiver has them. Short requests
may be answered here whole.

A request's blocks are all taken when it is admitted, since their number is known: those of the prompt, and of the longest
answer where it is given here. So what runs never needs a block and nothing is ever preempted. A request goes through

    WAITING -> RUNNING -> HANDING_OVER -> FINISHED      handed over; or it ends at its first token
    WAITING -> RUNNING ------------------> FINISHED      answered here, a token a step

or ends by ``abort`` anywhere. Blocks of a handoff that were reported as complete belong to the transfer as well, from that
report to ``release``: an aborted request leaves them to it, because a peer may be reading them.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import islice

from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold, Owner
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, Request, RequestState
from baton.services.core.scheduler.base import (
    RequestUpdate,
    ScheduledRequest,
    SchedulerLimits,
    SchedulerOutput,
    SchedulerStats,
    StepResult,
)
from baton.services.core.scheduler.block_tables import BlockTables, Plan, Sequence
from baton.services.core.scheduler.cache_moves import CacheMoves
from baton.services.core.scheduler.chunking import share_by_rank
from baton.services.core.scheduler.fairness import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST
from baton.services.core.scheduler.finish import append_token, check_can_be_served, ends_with_next_token, max_kv_tokens
from baton.services.core.scheduler.generating import Generating
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.scheduler.pace import Pace, prompt_budget
from baton.services.core.scheduler.progress import prefill_info, record_chunk
from baton.services.core.scheduler.waiting import Patience, WaitingQueue, is_yielding, merged, rank, tokens_left

# Part of seats and blocks that batch prompts may hold. Those in progress are never preempted here, so what they must not have
# when somebody in a hurry comes they do not get.
BATCH_SHARE = 0.5
# Waiting prompts whose cached prefix is looked up in one step; so many cannot all get tokens in it anyway.
MAX_LOOKAHEAD = 16


@dataclass(slots=True)
class _Outgoing:
    """The blocks of one handoff that a peer may read."""

    hold: Hold
    block_ids: list[int] = field(default_factory=list)


class PrefillScheduler:
    """Answers in progress first, one token each; then prompts, the most urgent first and tenants in turn, under a token budget
    in which short ones have a share."""

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
        self._tables = BlockTables(pool, namer, enable_prefix_caching=enable_prefix_caching)
        self._sequences: dict[str, Sequence] = {}  # everything that has not ended
        self._pace = pace or Pace()
        self._output_lengths = output_lengths or OutputLengthEstimator()
        self._waiting = WaitingQueue(self._pace, patience or Patience(), self._cost)
        self._generating = Generating(
            self._tables, self._waiting, self._output_lengths, limits.max_model_len, self._end
        )
        self._running: list[Sequence] = []  # most urgent first
        self._outgoing: dict[tuple[str, int], _Outgoing] = {}  # by request id and attempt; outlives the request
        self._num_added = 0
        self._now = 0.0  # of the last step

    @property
    def has_work(self) -> bool:
        return bool(self._running or len(self._waiting))

    def add(self, request: Request, *, is_whole: bool = False) -> None:
        """Queue a prompt, to be handed over or, ``is_whole``, answered here. Raises BatonError for one that this worker can
        never serve, or has already."""
        if request.request_id in self._sequences:
            raise BatonError(ErrorCode.INVALID_REQUEST, f"request {request.request_id} is already on this worker")
        max_model_len = self.limits.max_model_len
        num_kv_tokens = max_kv_tokens(request, max_model_len) if is_whole else request.num_tokens
        check_can_be_served(request, self.pool, max_model_len, num_kv_tokens)
        sequence = self._tables.open(request, self._num_added)
        sequence.is_whole = is_whole
        self._num_added += 1
        self._sequences[request.request_id] = sequence
        self._waiting.push(sequence)

    def is_handed_over(self, request: Request) -> bool:
        """A handoff will follow, where the answer is not given here, unless the first token happens to end the request."""
        return not ends_with_next_token(request, self.limits.max_model_len)

    def phase(self, request_id: str) -> str | None:
        """Where a request stands that has not ended; None for others."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else sequence.request.state.value

    def block_names(self, request_id: str) -> list[bytes]:
        """Names of the prompt's blocks, full ones, then a partial one. Raises KeyError for a request that is not here."""
        return self._sequences[request_id].initial_names

    def schedule(self, now: float) -> SchedulerOutput:
        self._now = now
        output = SchedulerOutput(expired=self._expire(now))
        answers = [ScheduledRequest(sequence.request, 1) for sequence in self._running if sequence.has_sampled]
        budget = prompt_budget(self.limits, self._pace, answers, self.pool.block_size, None, now)
        output.scheduled.extend(answers)
        prompts = [sequence for sequence in self._running if not sequence.has_sampled]
        candidates = merged(prompts, self._find_room(now))
        remaining = [(self._tables.num_left(sequence), is_yielding(sequence)) for sequence in candidates]
        shares = share_by_rank(remaining, budget, self.limits.short_prompt_share)
        for sequence, share in zip(candidates, shares, strict=True):
            request = sequence.request
            if share and (request.state is RequestState.RUNNING or self._admit(sequence, now)):
                output.scheduled.append(ScheduledRequest(request, min(share, request.num_uncomputed_tokens)))
        return output

    def update(self, output: SchedulerOutput, result: StepResult, now: float) -> list[RequestUpdate]:
        num_answering = sum(not item.request.is_prefilling for item in output.scheduled)
        self._pace.observe(now - self._now, output.num_tokens - num_answering, num_answering)
        return [
            self._advance(sequence, item, result, now)
            for item in output.scheduled
            if (sequence := self._sequences.get(item.request.request_id)) and sequence.request is item.request
        ]

    def release(self, request_id: str, attempt: int | None = None) -> bool:
        """The receiver has acknowledged, or the handoff was given up and nothing reads the blocks any more.

        They become evictable cache. Of several attempts only ``attempt``, by default all. False where none is known,
        which is no error: a request that ends before anything was reported has nothing to release.
        """
        keys = [key for key in self._outgoing if key[0] == request_id and attempt in (None, key[1])]
        for key in keys:
            outgoing = self._outgoing.pop(key)
            self.pool.release(outgoing.block_ids, outgoing.hold)
        sequence = self._sequences.get(request_id)
        if sequence is None or attempt not in (None, sequence.request.attempt):
            return bool(keys)
        if sequence.request.state is RequestState.HANDING_OVER:
            self._end(sequence, None)
        return True

    def renew_lease(self, request_id: str, attempt: int, now: float) -> None:
        """The transfer is alive: its blocks are overdue only after another lease."""
        if outgoing := self._outgoing.get((request_id, attempt)):
            outgoing.hold.deadline_s = now + self.limits.transfer_lease_s

    def abort(self, request_id: str) -> Request | None:
        """End a request in any state. Blocks that were reported stay the transfer's until ``release``."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._end(sequence, FinishReason.ABORT)
        return sequence.request

    def room_for_moves(self) -> int:
        """Blocks that may be taken to bring cached ones here: not those that the first in the queue waits for."""
        first = self._waiting.first(self._now)
        return self.pool.num_available - (0 if first is None else self._num_taken(first, self._tables.plan(first)))

    def stats(self) -> SchedulerStats:
        prefilling = [
            sequence
            for sequence in self._sequences.values()
            if sequence.request.state is not RequestState.HANDING_OVER and not sequence.has_sampled
        ]
        return SchedulerStats(
            queued=len(self._waiting),
            running=len(self._running),
            queued_tokens=tokens_left(prefilling),
            batch_queued_tokens=tokens_left(filter(is_yielding, prefilling)),
            handing_over=len(self._sequences) - len(self._waiting) - len(self._running),
            answering=sum(sequence.is_whole for sequence in self._sequences.values()),
        )

    def _expire(self, now: float) -> list[Request]:
        late = [s for s in self._waiting.values() if s.request.deadline_s is not None and s.request.deadline_s <= now]
        for sequence in late:
            self._end(sequence, FinishReason.ERROR)
        return [sequence.request for sequence in late]

    def _find_room(self, now: float) -> list[Sequence]:
        """The head of the queue, as far as there are seats and blocks for it. Takes nothing yet.

        In order: behind one that has no room nobody has, or the long would starve.
        """
        num_seats = self.limits.max_num_seqs - len(self._running)
        room = self.pool.num_available
        found: list[Sequence] = []
        for sequence in islice(self._waiting.in_order(now), max(0, min(num_seats, MAX_LOOKAHEAD))):
            num_taken = self._num_taken(sequence, self._tables.plan(sequence))
            if num_taken > room or (is_yielding(sequence) and not self._has_room_for_batch(found, room - num_taken)):
                break
            room -= num_taken
            found.append(sequence)
        return found

    def _has_room_for_batch(self, found: list[Sequence], room_left: int) -> bool:
        """Another batch prompt leaves enough for those in a hurry who may come."""
        if not found and not self._running and not self._outgoing:
            return True  # alone: or one that needs most of the pool would never run
        num_batch = sum(map(is_yielding, self._running)) + sum(map(is_yielding, found))
        has_seat = num_batch < max(1, int(self.limits.max_num_seqs * BATCH_SHARE))
        return has_seat and room_left >= self.pool.num_blocks * (1.0 - BATCH_SHARE)

    def _admit(self, sequence: Sequence, now: float) -> bool:
        plan = self._tables.plan(sequence)
        # Those admitted just before may have evicted a prefix that was counted on.
        if self._num_taken(sequence, plan) > self.pool.num_available:
            return False
        request = sequence.request
        self._tables.admit(sequence, plan)
        self._tables.grow(sequence, self._num_to_come(sequence))
        self._waiting.take(sequence, request.num_uncomputed_tokens)
        insort(self._running, sequence, key=rank)
        request.state = RequestState.RUNNING
        request.first_scheduled_s = now
        return True

    def _num_to_come(self, sequence: Sequence) -> int:
        """Blocks of an answer that is given here, beyond those of the tokens that there are."""
        if not sequence.is_whole:
            return 0
        request, num_blocks_for = sequence.request, self._tables.num_blocks_for
        return num_blocks_for(max_kv_tokens(request, self.limits.max_model_len)) - num_blocks_for(request.num_tokens)

    def _num_taken(self, sequence: Sequence, plan: Plan) -> int:
        """Available blocks that would be gone if it were admitted."""
        return plan.num_taken + self._num_to_come(sequence)

    def _cost(self, sequence: Sequence) -> float:
        """What a request that waits will probably cost its tenant."""
        request = sequence.request
        num_output = 0
        if sequence.is_whole:
            num_output = self._output_lengths.expected(request.sampling.max_tokens, request.num_output_tokens)
        return PROMPT_TOKEN_COST * request.num_uncomputed_tokens + OUTPUT_TOKEN_COST * num_output

    def _advance(self, sequence: Sequence, item: ScheduledRequest, result: StepResult, now: float) -> RequestUpdate:
        if sequence.is_whole:
            return self._generating.advance(sequence, item, result, now)
        request = sequence.request
        is_handed_over = self.is_handed_over(request)
        samples = item.samples
        record_chunk(sequence, item, result)
        completed = self._tables.complete(sequence, with_partial=samples)
        completed_ids = tuple(request.block_table[completed.start : completed.stop])
        first_index = request.num_output_tokens
        if not samples:
            if not is_handed_over:
                return RequestUpdate(request, (), first_index)
            self._hand_to_transfer(request, completed_ids, now)
            return RequestUpdate(
                request, (), first_index, completed_blocks=completed, completed_block_ids=completed_ids
            )

        token = result.sampled[request.request_id]
        reason = append_token(request, token.token_id, self.limits.max_model_len)
        if reason is None:
            self._hand_to_transfer(request, completed_ids, now)
            self._running.remove(sequence)
            request.state = RequestState.HANDING_OVER
        else:
            self._end(sequence, reason)
            completed, completed_ids = range(0), ()
        return RequestUpdate(
            request,
            new_tokens=(token,),
            first_index=first_index,
            finished=reason is not None,
            handing_over=reason is None,
            completed_blocks=completed,
            completed_block_ids=completed_ids,
            prefill=prefill_info(sequence, now),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if sequence.prompt_logprobs else None,
        )

    def _hand_to_transfer(self, request: Request, block_ids: tuple[int, ...], now: float) -> None:
        """From here the transfer owns these blocks as well. A chunk that ends renews its lease."""
        key = (request.request_id, request.attempt)
        outgoing = self._outgoing.get(key)
        if outgoing is None:
            if not block_ids:
                return
            outgoing = self._outgoing[key] = _Outgoing(Hold(Owner.TRANSFER, f"{key[0]}/{key[1]}"))
        self.pool.acquire(block_ids, outgoing.hold)
        outgoing.block_ids += block_ids
        outgoing.hold.deadline_s = now + self.limits.transfer_lease_s

    def _end(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """``reason`` is None for a request that goes on elsewhere."""
        request = sequence.request
        del self._sequences[request.request_id]
        self._waiting.remove(request.request_id)
        if request.state is RequestState.RUNNING:
            self._running.remove(sequence)
        self._tables.free(sequence)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
