"""What a scheduler decides and what it is told back: the one decision form is request -> number of tokens this step.

``schedule(now)`` returns a ``SchedulerOutput``; the engine performs it; ``update(output, result, now)`` takes the
``StepResult`` in and returns one ``RequestUpdate`` per request that got further. All times are seconds of the worker's
monotonic clock, passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from baton.services.core.errors import BatonError, ConfigurationError
from baton.services.core.request import Request, SampledToken, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one step may hold and how long things may take."""

    max_num_seqs: int  # most requests in a batch
    max_num_batched_tokens: int  # most tokens in a step
    max_model_len: int  # most tokens of prompt and output together
    short_prompt_share: float = 0.25  # part of a step's tokens that short prompts may take from a long one before them
    max_interleaved_prefill_tokens: int | None = None  # most prefill tokens in a step that also decodes; None: the rest
    transfer_lease_s: float = 30.0  # blocks that a transfer holds this long without a renewal are overdue

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigurationError(f"max_num_seqs is {self.max_num_seqs}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigurationError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs ({self.max_num_seqs}): "
                "a step must have room for one token of every running request"
            )
        if self.max_model_len < 2:
            raise ConfigurationError(f"max_model_len is {self.max_model_len}; it must be at least 2")
        if not 0.0 <= self.short_prompt_share < 1.0:
            raise ConfigurationError(f"short_prompt_share is {self.short_prompt_share}; it must be in [0, 1)")
        if self.max_interleaved_prefill_tokens is not None and self.max_interleaved_prefill_tokens < 1:
            raise ConfigurationError(
                f"max_interleaved_prefill_tokens is {self.max_interleaved_prefill_tokens}; it must be at least 1"
            )


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """Compute tokens [num_computed_tokens, num_computed_tokens + num_tokens) of ``request``. Its block table covers them."""

    request: Request
    num_tokens: int

    @property
    def samples(self) -> bool:
        """The chunk reaches the last token, so the step draws the next one."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens


@dataclass(frozen=True, slots=True)
class Slot:
    """A block that a transfer must fill."""

    index: int  # position in the request's block table and in the list of its prompt's block names
    block_id: int
    generation: int  # of that block at the grant; a write that names another generation is stale


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks granted to a handoff. The indices that are not in ``slots`` are held already and need not be sent."""

    request: Request
    slots: tuple[Slot, ...]
    num_held_blocks: int  # leading blocks found in this pool's prefix cache; pinned by the request
    num_cached_tokens: int  # prompt tokens in them, at most prompt length - 1
    requested_s: float
    granted_s: float


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. ``scheduled`` has the single-token requests first, each group in the order of urgency."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)  # lost their blocks and wait again
    granted: list[Reservation] = field(default_factory=list)  # reservations that had to wait and now have their blocks
    expired: list[Request] = field(default_factory=list)  # ended: their deadline passed before they could run

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the engine made of a ``SchedulerOutput``, keyed by request id.

    ``sampled`` holds exactly the scheduled requests whose chunk reached ``num_tokens``. ``prompt_logprobs`` holds, for
    requests that ask for them, the entries that this chunk adds: a chunk [a, b) yields those of prompt tokens
    a + 1 .. b (within the prompt), and the chunk that starts at 0 begins with None for token 0; so the chunks' lists, one
    after the other, have one entry per prompt token.

    ``failed`` holds scheduled requests that cannot go on, with the reason; they are aborted before the step is recorded,
    and the others know nothing of it.
    """

    sampled: dict[str, SampledToken] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs | None]] = field(default_factory=dict)
    failed: dict[str, BatonError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefillInfo:
    """How a prompt was computed; reported once, with the first token."""

    num_cached_tokens: int
    queue_s: float  # from arrival to the first step that computed for it
    prefill_s: float  # from that step's start to the first token


@dataclass(frozen=True, slots=True)
class RequestUpdate:
    """How far one request got in one step."""

    request: Request
    new_tokens: tuple[SampledToken, ...] = ()
    first_index: int = 0  # index in the generation of new_tokens[0], or of the next one
    finished: bool = False  # its last update; request.finish_reason and stop_token_id say why
    handing_over: bool = False  # its prompt is complete on a prefill worker: state HANDING_OVER until release()
    completed_blocks: range = range(0)  # indices into the block table that became complete, so that they can be sent
    completed_block_ids: tuple[int, ...] = ()  # the blocks at those indices
    prefill: PrefillInfo | None = None  # with the first token, where the prompt was computed here
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # with the first token, if asked for


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """What a worker tells the gateway about its load."""

    queued: int = 0  # requests waiting for their first step or for blocks
    running: int = 0  # requests in the batch
    queued_tokens: int = 0  # tokens that wait to be prefilled, queued or in progress
    batch_queued_tokens: int = 0  # of these, those that give way to others
    awaiting_kv: int = 0  # granted reservations whose blocks have not all arrived
    handing_over: int = 0  # computed prompts whose receiver has not acknowledged
    answering: int = 0  # of queued and running, those that a prefill worker answers itself
    preemptions_total: int = 0


class Scheduler(Protocol):
    """The part that both policies share; a worker's step loop needs no more than this."""

    @property
    def has_work(self) -> bool:
        """A step could do something: requests run, or wait for room."""

    def add(self, request: Request) -> None:
        """Queue ``request``. Raises BatonError where it can never be served; then nothing has changed."""

    def abort(self, request_id: str) -> Request | None:
        """End a request in any state. Returns it, or None where it is unknown or has ended."""

    def schedule(self, now: float) -> SchedulerOutput:
        """Decide the next step and take the blocks that it needs."""

    def update(self, output: SchedulerOutput, result: StepResult, now: float) -> list[RequestUpdate]:
        """Record a step, before the next ``schedule``. Where the engine failed, abort what was scheduled instead."""

    def block_names(self, request_id: str) -> list[bytes]:
        """Names of the blocks of the request's tokens as they were when it came: full ones, then a partial one."""

    def phase(self, request_id: str) -> str | None:
        """Where a request stands that has not ended: its state. None for one that has, or is not known."""

    def stats(self) -> SchedulerStats:
        """The load now."""
