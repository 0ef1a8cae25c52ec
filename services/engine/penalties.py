"""Changes to a row's logits that depend on the tokens so far: penalties, logit_bias, min_tokens.

Order: repetition penalty, frequency and presence penalties, then ``logit_bias``, then the ban on ending tokens; so a bias
is worth what its number says whatever was generated before, and a ban cannot be undone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from baton.services.core.request import Request, SamplingParams


def is_adjusted(request: Request) -> bool:
    """Whether anything here applies to the request's next token."""
    sampling = request.sampling
    return bool(sampling.has_penalties or sampling.logit_bias or request.num_output_tokens < sampling.min_tokens)


class TokenCounts:
    """The distinct tokens of one sequence and how often each was generated, grown token by token."""

    __slots__ = ("_counts", "_ids", "_index", "_num_distinct", "_num_seen")

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._ids: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._counts: npt.NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self._num_distinct = 0
        self._num_seen = 0

    def update(self, request: Request) -> None:
        """Take in the tokens that came since the last call."""
        for position in range(self._num_seen, request.num_tokens):
            token_id = request.token_ids[position]
            slot = self._index.get(token_id)
            if slot is None:
                slot = self._index[token_id] = self._num_distinct
                self._num_distinct += 1
                if slot >= self._ids.size:
                    self._grow()
                self._ids[slot] = token_id
            if position >= request.num_prompt_tokens:
                self._counts[slot] += 1
        self._num_seen = request.num_tokens

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct token ids [n] int64, and how often each is in the output [n] float32 (0: in the prompt only)."""
        ids = torch.from_numpy(self._ids[: self._num_distinct])
        return ids.to(device), torch.from_numpy(self._counts[: self._num_distinct]).to(device)

    def _grow(self) -> None:
        size = max(64, 2 * self._ids.size)
        ids, counts = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.float32)
        ids[: self._ids.size], counts[: self._counts.size] = self._ids, self._counts
        self._ids, self._counts = ids, counts


class LogitAdjuster:
    """Applies the adjustments. Remembers the counts of the last call's requests only, so nothing has to be freed."""

    def __init__(self) -> None:
        self._counts: dict[Request, TokenCounts] = {}

    def apply(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        """Change ``logits`` [len(requests), vocab_size] (float32) in place."""
        previous, self._counts = self._counts, {}
        for row, request in zip(logits.unbind(0), requests, strict=True):
            sampling = request.sampling
            if sampling.has_penalties:
                counts = self._counts[request] = previous.get(request) or TokenCounts()
                counts.update(request)
                _penalize(row, sampling, *counts.tensors(row.device))
            if sampling.logit_bias:
                ids, biases = zip(*sampling.logit_bias, strict=True)
                _add_bias(row, ids, biases)
            if request.num_output_tokens < sampling.min_tokens:
                row[_valid(sampling.ending_token_ids, row)] = -torch.inf


def _penalize(row: torch.Tensor, sampling: SamplingParams, ids: torch.Tensor, counts: torch.Tensor) -> None:
    """Repetition: Keskar et al., https://arxiv.org/abs/1909.05858, over prompt and output; the others as OpenAI defines
    them, over the output.
    """
    values = row[ids]
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        values = torch.where(values > 0, values / penalty, values * penalty)
    values -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    row[ids] = values


def _add_bias(row: torch.Tensor, ids: Sequence[int], biases: Sequence[float]) -> None:
    kept = [(token_id, bias) for token_id, bias in zip(ids, biases, strict=True) if 0 <= token_id < row.numel()]
    index = torch.tensor([token_id for token_id, _ in kept], dtype=torch.int64, device=row.device)
    row.index_add_(0, index, torch.tensor([bias for _, bias in kept], dtype=row.dtype, device=row.device))


def _valid(token_ids: frozenset[int], row: torch.Tensor) -> torch.Tensor:
    """Ids outside the vocabulary cannot be drawn anyway; as an index they would fail the whole batch."""
    ids = [token_id for token_id in token_ids if 0 <= token_id < row.numel()]
    return torch.tensor(ids, dtype=torch.int64, device=row.device)
