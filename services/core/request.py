"""A request as the schedulers see it: a token list, a block table, and how far the KV cache has got."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from baton.services.core.sessions import SessionTag
from baton.services.core.slo import ServiceLevel


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestState(StrEnum):
    """Where a request is in its life on one worker."""

    WAITING = "waiting"  # queued; holds no blocks
    AWAITING_KV = "awaiting_kv"  # blocks are granted to a transfer that fills them
    RUNNING = "running"  # in the batch
    HANDING_OVER = "handing_over"  # computed; its blocks are pinned until the receiver acknowledges
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Every default is resolved before a request reaches a worker.

    ``seed`` keys a counter-based generator: a draw is a function of (logits, seed, position) alone.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # unsigned 64 bit
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: str | None = None  # what the output must match, in the engine's own terms

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """Tokens that end the generation once ``min_tokens`` are there; before that they cannot be drawn."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's own logprob and the most likely alternatives, most likely first. Natural log, before temperature."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SampledToken(NamedTuple):
    """One generated token. They are many: a tuple is made in half the time of any other record."""

    token_id: int
    logprobs: TokenLogprobs | None = None  # set when the request asked for logprobs


@dataclass(slots=True, eq=False)
class Request:
    """One generation on one worker. Only the scheduler changes it; the engine reads it.

    Prompt and output are one list, ``token_ids``; the KV of its first ``num_computed_tokens`` tokens is in the blocks
    of ``block_table``. A step computes tokens [num_computed_tokens, num_computed_tokens + n); when that reaches
    ``num_tokens`` the step samples one more.
    """

    request_id: str
    attempt: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: str = ""
    arrival_s: float = 0.0  # worker's monotonic clock
    deadline_s: float | None = None
    service: ServiceLevel = field(default_factory=ServiceLevel)
    session: SessionTag | None = None  # the conversation that keeps its blocks afterwards
    state: RequestState = RequestState.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    first_scheduled_s: float | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        """More than one token is to be computed: the prompt, or everything again after a preemption."""
        return self.num_uncomputed_tokens > 1

    @property
    def max_total_tokens(self) -> int:
        return self.num_prompt_tokens + self.sampling.max_tokens
