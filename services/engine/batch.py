"""Turns a step's schedule into the flat tensors that a forward pass reads.

Rows with one token (decodes, mostly) come first, then the chunks: each half has its own attention kernel. Inside a half
the schedule's order is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from baton import kernels
from baton.services.core.request import Request
from baton.services.core.scheduler.base import ScheduledRequest


@dataclass(slots=True)
class ForwardBatch:
    """One step's tokens, flattened. T tokens of D single-token rows and then C chunks; R output rows."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, index in the sequence
    slot_mapping: torch.Tensor  # [T] int64, block_id * block_size + offset
    block_tables: torch.Tensor  # [D + C, max_blocks] int32, zero past a sequence's end
    seq_lens: torch.Tensor  # [D + C] int32, this step's tokens included
    cu_seqlens: torch.Tensor  # [C + 1] int32, where each chunk begins among the chunks' tokens
    num_decodes: int  # D
    num_tokens: int  # T
    max_seq_len: int
    output_rows: torch.Tensor | None  # [R] int64, rows whose logits are wanted; None: all of them, in order
    block_size: int
    _plans: dict[int | None, kernels.DecodePlan] = field(default_factory=dict)

    def decode_plan(self, window: int | None) -> kernels.DecodePlan | None:
        """How the CPU groups the single-token rows: made once for all layers with the same window. None on GPU."""
        if self.block_tables.device.type != "cpu":
            return None
        plan = self._plans.get(window)
        if plan is None:
            rows = slice(self.num_decodes)
            plan = kernels.plan_decode(self.block_tables[rows], self.seq_lens[rows], self.block_size, window)
            self._plans[window] = plan
        return plan


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Output rows [start, start + count) predict the prompt's tokens from ``first_position`` on."""

    request: Request
    start: int
    count: int
    first_position: int


@dataclass(slots=True)
class OutputPlan:
    """Who the output rows belong to."""

    sampled: list[Request]
    sampled_rows: list[int] | None  # one per sampled request; None: the output rows are exactly these, in order
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

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._rows: dict[Request, _BlockRow] = {}

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
            num_tokens = int(ends[-1])
            positions = np.arange(num_tokens) + (starts - ends + counts)[sequence_of]
            tokens: list[int] = []
            for item in ordered:
                first = item.request.num_computed_tokens
                tokens += item.request.token_ids[first : first + item.num_tokens]
            cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
            np.cumsum(counts[len(decodes) :], out=cu_seqlens[1:])
            seq_lens = starts + counts
        else:
            num_tokens = len(ordered)
            sequence_of = np.arange(num_tokens)
            positions = starts
            tokens = [request.token_ids[request.num_computed_tokens] for request in requests]
            cu_seqlens = np.zeros(1, dtype=np.int32)
            seq_lens = starts + 1

        block_index, offset = np.divmod(positions, self._block_size)
        slots = tables[sequence_of, block_index].astype(np.int64) * self._block_size + offset
        output_rows, plan = _plan_outputs(ordered, num_tokens)
        batch = ForwardBatch(
            token_ids=self._to_device(np.array(tokens, dtype=np.int64)),
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slots),
            block_tables=self._to_device(tables),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            cu_seqlens=self._to_device(cu_seqlens),
            num_decodes=len(decodes),
            num_tokens=num_tokens,
            max_seq_len=int(seq_lens.max()),
            block_size=self._block_size,
            output_rows=None if output_rows is None else self._to_device(np.array(output_rows, dtype=np.int64)),
        )
        return batch, plan

    def _block_tables(self, requests: list[Request]) -> npt.NDArray[np.int32]:
        previous, self._rows = self._rows, {}
        tables = np.zeros((len(requests), max(len(request.block_table) for request in requests)), dtype=np.int32)
        for index, request in enumerate(requests):
            row = self._rows[request] = previous.get(request) or _BlockRow()
            blocks = row.update(request.block_table)
            tables[index, : blocks.size] = blocks
        return tables

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def _plan_outputs(ordered: list[ScheduledRequest], num_tokens: int) -> tuple[list[int] | None, OutputPlan]:
    """Which rows need logits: the last of each request that reaches its end, and prompts whose logprobs are wanted."""
    sampled: list[Request] = []
    sampled_rows: list[int] = []
    prompts: list[PromptRows] = []
    rows: list[int] = []
    begin = 0
    for item in ordered:
        request = item.request
        computed, last = request.num_computed_tokens, begin + item.num_tokens - 1
        samples = computed + item.num_tokens == request.num_tokens
        if wants_prompt_logprobs(request):
            # The row at position p predicts token p + 1; the prompt's last row predicts the first output token.
            count = min(item.num_tokens, request.num_prompt_tokens - 1 - computed)
            prompts.append(PromptRows(request, len(rows), max(count, 0), computed + 1))
            rows.extend(range(begin, begin + count))
        if samples:
            sampled.append(request)
            sampled_rows.append(len(rows))
            rows.append(last)
        begin += item.num_tokens
    plan = OutputPlan(sampled, sampled_rows if prompts else None, prompts)
    return None if len(rows) == num_tokens else rows, plan


def wants_prompt_logprobs(request: Request) -> bool:
    """They are given while the prompt is first computed, not when it is computed again after a preemption."""
    return request.sampling.num_prompt_logprobs is not None and request.num_output_tokens == 0
