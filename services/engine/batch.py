"""Turns a step's schedule into the flat tensors that a forward pass reads.

Rows with one token (decodes, mostly) come first, then the chunks: each half has its own attention kernel. Inside a half
the schedule's order is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from baton import kernels
from baton.services.core.request import Request
from baton.services.core.scheduler.base import ScheduledRequest


@dataclass(slots=True)
class AttentionRows:
    """Queries and the contexts that they see: D single queries, then C chunks of several queries of one sequence each."""

    block_tables: torch.Tensor  # [D + C, max_blocks] int32, zero past a sequence's end
    seq_lens: torch.Tensor  # [D + C] int32, this step's tokens included
    cu_seqlens: torch.Tensor  # [C + 1] int32, where each chunk begins among the chunks' queries
    num_decodes: int  # D
    num_rows: int
    block_size: int
    _plans: dict[int | None, kernels.DecodePlan] = field(default_factory=dict)

    def decode_plan(self, window: int | None) -> kernels.DecodePlan | None:
        """How the CPU groups the single queries: made once for all layers with the same window. None on GPU."""
        if self.block_tables.device.type != "cpu":
            return None
        plan = self._plans.get(window)
        if plan is None:
            rows = slice(self.num_decodes)
            plan = kernels.plan_decode(self.block_tables[rows], self.seq_lens[rows], self.block_size, window)
            self._plans[window] = plan
        return plan


@dataclass(slots=True)
class ForwardBatch:
    """One step's T tokens, flattened.

    With ``output_rows`` the last layer stores everybody's K and V, but computes on with these rows only: nobody reads
    the others.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, index in the sequence
    slot_mapping: torch.Tensor  # [T] int64, block_id * block_size + offset
    rows: AttentionRows  # all T
    output_rows: torch.Tensor | None  # [R] int64, each the last of its sequence; None: all T are outputs
    last_layer_rows: AttentionRows  # the R output rows as single queries; ``rows`` when output_rows is None
    max_seq_len: int

    def select_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [R, ...]."""
        return x if self.output_rows is None else x[self.output_rows]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Outputs [start, start + count) predict the prompt's tokens from ``first_position`` on."""

    request: Request
    start: int
    count: int
    first_position: int


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """Who the forward pass's outputs belong to."""

    sampled: list[Request]
    sampled_outputs: list[int] | None  # one for each sampled request; None: outputs are exactly these, in order
    prompts: list[PromptRows]


class _BlockRow:
    """A request's block table as an array, kept from step to step: a table grows by one block every few steps."""

    __slots__ = ("array", "blocks")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.array: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)

    def update(self, block_table: list[int]) -> npt.NDArray[np.int32]:
        """Comparing the lists is an order of magnitude cheaper than converting one, and sees every kind of change."""
        if self.blocks != block_table:
            self.blocks = block_table.copy()
            self.array = np.array(block_table, dtype=np.int32)
        return self.array


class BatchBuilder:
    """Builds batches; remembers the block tables of the last step's requests only, so nothing has to be freed."""

    def __init__(self, block_size: int, device: torch.device, *, trim_last_layer: bool = True) -> None:
        self._block_size = block_size
        self._device = device
        self._trim_last_layer = trim_last_layer
        self._block_rows: dict[Request, _BlockRow] = {}

    def build(self, scheduled: Sequence[ScheduledRequest]) -> tuple[ForwardBatch, OutputPlan]:
        """``scheduled``: distinct requests, each with at least one uncomputed token and blocks for all of them."""
        decodes = [item for item in scheduled if item.num_tokens == 1]
        chunks = [item for item in scheduled if item.num_tokens > 1]
        ordered = decodes + chunks if chunks else decodes
        requests = [item.request for item in ordered]
        starts = np.array([request.num_computed_tokens for request in requests], dtype=np.int64)
        tables = self._block_tables(requests)

        if chunks:
            counts = np.array([item.num_tokens for item in ordered], dtype=np.int64)
            sequence_of = np.repeat(np.arange(len(ordered)), counts)
            ends = np.cumsum(counts)
            positions = np.arange(ends[-1]) + (starts - ends + counts)[sequence_of]
            tokens: list[int] = []
            for item in ordered:
                first = item.request.num_computed_tokens
                tokens += item.request.token_ids[first : first + item.num_tokens]
            cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
            np.cumsum(counts[len(decodes) :], out=cu_seqlens[1:])
            seq_lens = (starts + counts).astype(np.int32)
        else:
            sequence_of = np.arange(len(ordered))
            ends = sequence_of + 1
            positions = starts
            tokens = [request.token_ids[request.num_computed_tokens] for request in requests]
            cu_seqlens = np.zeros(1, dtype=np.int32)
            seq_lens = (starts + 1).astype(np.int32)

        block_index, offset = np.divmod(positions, self._block_size)
        slots = tables[sequence_of, block_index].astype(np.int64) * self._block_size + offset
        rows = self._attention_rows(tables, seq_lens, cu_seqlens, len(decodes), len(tokens))
        samples = [item.request.num_computed_tokens + item.num_tokens == item.request.num_tokens for item in ordered]
        prompts = [
            _prompt_rows(item, int(end))
            for item, end in zip(ordered, ends, strict=True)
            if _wants_logprobs(item.request)
        ]
        plan = OutputPlan([r for r, wanted in zip(requests, samples, strict=True) if wanted], None, prompts)
        output_rows, last_layer_rows = None, rows
        if prompts or not (self._trim_last_layer or all(samples)):
            plan = replace(plan, sampled_outputs=(ends[samples] - 1).tolist())
        elif len(plan.sampled) < len(tokens):
            # A step of unfinished prompts has no outputs; one row keeps every kernel's input non-empty, unread.
            kept = np.flatnonzero(samples) if plan.sampled else np.zeros(1, dtype=np.int64)
            output_rows = self._to_device(ends[kept] - 1)
            last_layer_rows = self._attention_rows(
                tables[kept], seq_lens[kept], np.zeros(1, dtype=np.int32), len(kept), len(kept)
            )
        batch = ForwardBatch(
            token_ids=self._to_device(np.array(tokens, dtype=np.int64)),
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slots),
            rows=rows,
            output_rows=output_rows,
            last_layer_rows=last_layer_rows,
            max_seq_len=int(seq_lens.max()),
        )
        return batch, plan

    def _attention_rows(
        self,
        tables: npt.NDArray[np.int32],
        seq_lens: npt.NDArray[np.int32],
        cu_seqlens: npt.NDArray[np.int32],
        num_decodes: int,
        num_rows: int,
    ) -> AttentionRows:
        return AttentionRows(
            block_tables=self._to_device(tables),
            seq_lens=self._to_device(seq_lens),
            cu_seqlens=self._to_device(cu_seqlens),
            num_decodes=num_decodes,
            num_rows=num_rows,
            block_size=self._block_size,
        )

    def _block_tables(self, requests: list[Request]) -> npt.NDArray[np.int32]:
        previous, self._block_rows = self._block_rows, {}
        tables = np.zeros((len(requests), max(len(request.block_table) for request in requests)), dtype=np.int32)
        for index, request in enumerate(requests):
            row = self._block_rows[request] = previous.get(request) or _BlockRow()
            blocks = row.update(request.block_table)
            tables[index, : blocks.size] = blocks
        return tables

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def _wants_logprobs(request: Request) -> bool:
    """Prompt logprobs are given while the prompt is first computed, not when it is again after a preemption."""
    return request.sampling.num_prompt_logprobs is not None and request.num_output_tokens == 0


def _prompt_rows(item: ScheduledRequest, end: int) -> PromptRows:
    """``end``: the row after the request's last. The row at position p predicts token p + 1; the prompt's last row
    predicts the first output token.
    """
    request, computed = item.request, item.request.num_computed_tokens
    count = min(item.num_tokens, request.num_prompt_tokens - 1 - computed)
    return PromptRows(request, end - item.num_tokens, max(count, 0), computed + 1)
