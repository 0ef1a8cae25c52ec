"""What a step does to a request that generates where it runs, the same under every policy."""

from __future__ import annotations

from collections.abc import Callable

from baton.services.core.request import FinishReason
from baton.services.core.scheduler.base import RequestUpdate, ScheduledRequest, StepResult
from baton.services.core.scheduler.block_tables import BlockTables, Sequence
from baton.services.core.scheduler.finish import append_token
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.core.scheduler.progress import prefill_info, record_chunk
from baton.services.core.scheduler.waiting import WaitingQueue


class Generating:
    """Records steps of requests whose answers are given on this worker, to their ends."""

    def __init__(
        self,
        tables: BlockTables,
        queue: WaitingQueue,
        output_lengths: OutputLengthEstimator,
        max_model_len: int,
        end: Callable[[Sequence, FinishReason], None],
    ) -> None:
        """``end`` takes a request off its scheduler."""
        self._tables = tables
        self._queue = queue
        self._output_lengths = output_lengths
        self._max_model_len = max_model_len
        self._end = end

    def advance(self, sequence: Sequence, item: ScheduledRequest, result: StepResult, now: float) -> RequestUpdate:
        """A chunk of it is computed, which may have drawn a token."""
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
        self._queue.charge_output(sequence)
        reason = append_token(request, token.token_id, self._max_model_len)
        if reason is not None:
            self._output_lengths.observe(request.num_output_tokens)
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
