"""A scheduler without an engine: requests, steps and results made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.request import Request, SampledToken, SamplingParams
from baton.services.core.scheduler.base import (
    RequestUpdate,
    Scheduler,
    SchedulerLimits,
    SchedulerOutput,
    StepResult,
)
from baton.services.core.scheduler.decode import DecodeScheduler
from baton.services.core.scheduler.prefill import PrefillScheduler
from baton.services.core.slo import ServiceLevel, SloClass

NAMER = BlockNamer(b"key of the tests", "model")
BLOCK_SIZE = 4


def make_request(
    request_id: str,
    num_prompt_tokens: int,
    *,
    max_tokens: int = 8,
    first_token: int = 0,
    attempt: int = 1,
    arrival_s: float = 0.0,
    deadline_s: float | None = None,
    cache_salt: str = "",
    service: ServiceLevel | None = None,
    **sampling: Any,
) -> Request:
    """Its prompt counts up from ``first_token``, so that prompts with the same start share their prefix."""
    return Request(
        request_id,
        attempt,
        list(range(first_token, first_token + num_prompt_tokens)),
        num_prompt_tokens,
        SamplingParams(max_tokens=max_tokens, **sampling),
        arrival_s=arrival_s,
        deadline_s=deadline_s,
        cache_salt=cache_salt,
        service=service or ServiceLevel(),
    )


def interactive(due_s: float | None = None, **fields: Any) -> ServiceLevel:
    """What somebody is promised who watches."""
    return ServiceLevel(SloClass.INTERACTIVE, due_s, **fields)


def standard(due_s: float | None = None, **fields: Any) -> ServiceLevel:
    """What somebody is promised who waits."""
    return ServiceLevel(SloClass.STANDARD, due_s, **fields)


def batch(**fields: Any) -> ServiceLevel:
    """What nobody waits for."""
    return ServiceLevel(SloClass.BATCH, **fields)


def make_limits(**changes: Any) -> SchedulerLimits:
    return SchedulerLimits(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64} | changes)


def make_prefill(
    num_blocks: int = 32, *, prefix_caching: bool = True, pace: Any = None, patience: Any = None, **limits: Any
) -> PrefillScheduler:
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    return PrefillScheduler(
        pool, NAMER, make_limits(**limits), enable_prefix_caching=prefix_caching, pace=pace, patience=patience
    )


def make_decode(
    num_blocks: int = 32,
    *,
    prefix_caching: bool = True,
    output_lengths: Any = None,
    pace: Any = None,
    patience: Any = None,
    **limits: Any,
) -> DecodeScheduler:
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    return DecodeScheduler(
        pool,
        NAMER,
        make_limits(**limits),
        output_lengths=output_lengths,
        enable_prefix_caching=prefix_caching,
        pace=pace,
        patience=patience,
    )


def shape(output: SchedulerOutput) -> dict[str, int]:
    """The decision: request id -> number of tokens."""
    return {item.request.request_id: item.num_tokens for item in output.scheduled}


def result_of(output: SchedulerOutput, token_of: Callable[[Request], int] = lambda request: 1000) -> StepResult:
    """What an engine would return that draws ``token_of(request)``."""
    return StepResult(
        {item.request.request_id: SampledToken(token_of(item.request)) for item in output.scheduled if item.samples}
    )


def step(
    scheduler: Scheduler,
    now: float = 0.0,
    *,
    end: float | None = None,
    token_of: Callable[[Request], int] = lambda request: 1000,
) -> tuple[SchedulerOutput, dict[str, RequestUpdate]]:
    """One step, and its updates by request id."""
    output = scheduler.schedule(now)
    updates = scheduler.update(output, result_of(output, token_of), now if end is None else end)
    return output, {update.request.request_id: update for update in updates}


def run_until_idle(scheduler: Scheduler, max_steps: int = 500) -> list[RequestUpdate]:
    """All updates until there is no work. Fails where that takes too long."""
    updates: list[RequestUpdate] = []
    for _ in range(max_steps):
        if not scheduler.has_work:
            return updates
        updates += step(scheduler)[1].values()
    raise AssertionError(f"still at work after {max_steps} steps: {scheduler.stats()}")
