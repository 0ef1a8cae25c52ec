"""What a worker that was started with failpoints is made of: its engine and its pool pass them first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold
from baton.services.core.scheduler.base import ScheduledRequest, StepResult
from baton.services.engine.engine import Engine
from baton.services.runtime.failpoints import FailpointReached, reach
from baton.services.worker.step_loop import StepEngine


class FailpointEngine:
    """A step that may fail, hang or end the process before it is computed, or half-way through the model."""

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self._prompt_ids: Callable[[], Iterator[int]] | None = None  # of the step under way, where it computes prompts
        if isinstance(engine, Engine):
            self._middle = engine.shape.num_layers // 2
            engine.progress.on_layer = self._on_layer

    def _on_layer(self, layer: int) -> None:
        if layer == self._middle and self._prompt_ids is not None:
            reach("prefill.mid_layer", self._prompt_ids)

    def step(self, batch: list[ScheduledRequest]) -> StepResult:
        def token_ids() -> Iterator[int]:
            return (token_id for item in batch for token_id in item.request.token_ids)

        if any(map(_is_later_chunk, batch)):
            reach("prefill.between_chunks", token_ids)
        if any(item.request.num_output_tokens for item in batch):
            reach("decode.step_n", token_ids)
        reach("engine.step_hang", token_ids)
        reach("engine.step_crash", token_ids)
        reach("engine.oom", token_ids, error=torch.OutOfMemoryError)
        self._prompt_ids = token_ids if any(not item.request.num_output_tokens for item in batch) else None
        return self._engine.step(batch)


class FailpointPool(BlockPool):
    """A pool that may seem exhausted to whoever asks what it has."""

    _is_allocating = False

    @property
    def num_available(self) -> int:
        num_available = super().num_available
        if not self._is_allocating:  # what was promised is given
            try:
                reach("alloc.oom")
            except FailpointReached:
                return 0
        return num_available

    def allocate(self, num_blocks: int, hold: Hold) -> list[int]:
        self._is_allocating = True
        try:
            return super().allocate(num_blocks, hold)
        finally:
            self._is_allocating = False


def _is_later_chunk(item: ScheduledRequest) -> bool:
    request = item.request
    return not request.num_output_tokens and request.num_computed_tokens > request.num_cached_tokens
