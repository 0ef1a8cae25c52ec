"""What a step adds to a request, the same under every policy."""

from __future__ import annotations

from baton.services.core.scheduler.base import PrefillInfo, ScheduledRequest, StepResult
from baton.services.core.scheduler.block_tables import Sequence


def record_chunk(sequence: Sequence, item: ScheduledRequest, result: StepResult) -> None:
    """The chunk is computed."""
    sequence.request.num_computed_tokens += item.num_tokens
    if not sequence.has_sampled:
        sequence.prompt_logprobs += result.prompt_logprobs.get(item.request.request_id, ())


def prefill_info(sequence: Sequence, now: float) -> PrefillInfo:
    """For the first token of a prompt that was computed here, which was sampled now."""
    request = sequence.request
    assert request.first_scheduled_s is not None
    return PrefillInfo(
        num_cached_tokens=request.num_cached_tokens,
        queue_s=request.first_scheduled_s - request.arrival_s,
        prefill_s=now - request.first_scheduled_s,
    )
