"""Requests' block tables over the pool: prefix hits at admission, growth, and names for blocks as they fill."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold, Owner
from baton.services.core.request import Request, RequestState, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and what its scheduler remembers of it."""

    request: Request
    order: int  # of arrival at the scheduler
    hold: Hold
    names: list[bytes]  # of the full blocks known so far
    num_initial_full: int  # names that the request came with
    partial_name: bytes | None  # of the tokens behind those
    num_named: int = 0  # leading blocks of the table that have been named
    num_reported: int = 0  # leading blocks of the table that have been reported as complete
    due_s: float = 0.0  # work on it has to begin by then
    can_be_late: bool = False  # it has a target that it has not been put back for yet
    is_promoted: bool = False  # batch that has given way for long enough
    promised_blocks: int = 0  # blocks that admission promised it, those in its table included
    is_whole: bool = False  # a prefill worker answers it itself, instead of handing it over
    has_sampled: bool = False  # its first token on this worker is there
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def initial_names(self) -> list[bytes]:
        """Names of all blocks of the tokens with which the request came."""
        return self.names[: self.num_initial_full] + ([] if self.partial_name is None else [self.partial_name])


@dataclass(frozen=True, slots=True)
class Plan:
    """What admitting a request would take, as the pool is now."""

    hits: list[int]  # blocks of the cached prefix
    num_new: int  # blocks to allocate for the rest of its tokens
    num_taken: int  # available blocks that would be gone: the new ones and the hits that nobody holds now


class BlockTables:
    """Gives requests their blocks. Holds nothing itself but the pool."""

    def __init__(self, pool: BlockPool, namer: BlockNamer, *, enable_prefix_caching: bool = True) -> None:
        self.pool = pool
        self._namer = namer
        self._block_size = pool.block_size
        self._enable_prefix_caching = enable_prefix_caching

    def open(self, request: Request, order: int) -> Sequence:
        """Begin with a request that holds no blocks yet."""
        names = self._namer.names(request.token_ids, self._block_size, request.cache_salt)
        partial_name = names.pop() if request.num_tokens % self._block_size else None
        level = request.service
        hold = Hold(Owner.REQUEST, request.request_id, tenant=level.tenant, weight=level.weight)
        if request.session is not None and self._enable_prefix_caching:
            hold.session = self.pool.retention.open(request.session, self.pool.now_s, level.tenant, level.weight)
        return Sequence(request, order, hold, names, len(names), partial_name)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def plan(self, sequence: Sequence, *, num_hits: int | None = None) -> Plan:
        """What admission would take. ``num_hits`` bounds the prefix; by default all full blocks that leave a token over,
        since the last token has to be computed to sample the next."""
        request = sequence.request
        if num_hits is None:
            num_hits = (request.num_tokens - 1) // self._block_size
        wants_every_position = request.sampling.num_prompt_logprobs is not None and not sequence.has_sampled
        if self._enable_prefix_caching and not wants_every_position:
            hits = self.pool.lookup(sequence.names[:num_hits])
        else:
            hits = []
        num_new = self.num_blocks_for(request.num_tokens) - len(hits)
        return Plan(hits, num_new, num_new + sum(map(self.pool.is_idle, hits)))

    def num_to_compute(self, sequence: Sequence) -> int:
        """Tokens that a request would have to compute if it were admitted now."""
        return sequence.request.num_tokens - len(self.plan(sequence).hits) * self._block_size

    def num_left(self, sequence: Sequence) -> int:
        """Tokens that it still has to compute, or would have to if it were admitted now."""
        is_admitted = sequence.request.state is RequestState.RUNNING
        return sequence.request.num_uncomputed_tokens if is_admitted else self.num_to_compute(sequence)

    def admit(self, sequence: Sequence, plan: Plan, transfer: Hold | None = None) -> list[int]:
        """Carry out a plan made just now: pin the hits, allocate the rest and return it.

        The new blocks go into the request's table, unless ``transfer`` takes them, to fill them first.
        """
        request = sequence.request
        self.pool.acquire(plan.hits, sequence.hold)
        new = self.pool.allocate(plan.num_new, transfer or sequence.hold)
        request.block_table = list(plan.hits) if transfer else plan.hits + new
        request.num_computed_tokens = len(plan.hits) * self._block_size
        sequence.num_named = len(plan.hits)
        sequence.num_reported = 0
        if not request.num_preemptions:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens - 1)
        return new

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """Blocks that the table lacks to compute ``num_tokens`` more."""
        return max(0, self.num_blocks_for(request.num_computed_tokens + num_tokens) - len(request.block_table))

    def grow(self, sequence: Sequence, num_blocks: int) -> None:
        sequence.request.block_table.extend(self.pool.allocate(num_blocks, sequence.hold))

    def complete(self, sequence: Sequence, *, with_partial: bool = False) -> range:
        """Name the blocks that are full now, which puts them into the prefix cache; indices not reported before.

        ``with_partial``: no token will be added any more, so that the last block, partly filled, is complete as well.
        """
        request, names, size = sequence.request, sequence.names, self._block_size
        num_full = request.num_computed_tokens // size
        if self._enable_prefix_caching and num_full > sequence.num_named:
            if len(names) < num_full:
                parent = names[-1] if names else self._namer.root(size, request.cache_salt)
                names += self._namer.extend(parent, request.token_ids[len(names) * size : num_full * size], size)
            for index in range(sequence.num_named, num_full):
                self.pool.name_block(request.block_table[index], names[index])
            sequence.num_named = num_full
        num_complete = num_full
        if with_partial and request.num_computed_tokens % size:
            num_complete += 1
            if self._enable_prefix_caching and sequence.partial_name is not None:
                self.pool.name_block(request.block_table[num_full], sequence.partial_name)
        newly = range(sequence.num_reported, num_complete)
        sequence.num_reported = max(sequence.num_reported, num_complete)
        return newly

    def name_block(self, sequence: Sequence, index: int, block_id: int) -> None:
        """Name one full block of the tokens with which the request came, which somebody else has filled."""
        if self._enable_prefix_caching and index < sequence.num_initial_full:
            self.pool.name_block(block_id, sequence.names[index])

    def free(self, sequence: Sequence) -> None:
        """Let the request go of all its blocks. Its computed tokens are forgotten; what is named stays as cache."""
        request = sequence.request
        self.pool.release(request.block_table, sequence.hold)
        request.block_table = []
        request.num_computed_tokens = 0
        sequence.num_named = sequence.num_reported = 0
