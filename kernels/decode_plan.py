"""How the torch path batches decode attention: sequences of like length together, found once per step.

Padding costs reads, a call per sequence costs calls. So sequences are sorted by the number of keys they see and cut into
groups, each computed as one batch; a group ends where padding would cost more than the calls it saves. Long sequences
mostly come out alone, unpadded; many short ones come out as one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["DecodePlan", "plan_decode"]

# A group's calls cost about as much as reading this many tokens (measured; the exact number matters little).
_PADDING_TOKENS = 256
_PADDING_SHARE = 0.125
# Keys and values of a group are copied out of the cache and read again; up to this size they are still in L2 or L3.
_MAX_GROUP_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences whose attention is computed as one batch; n of them, over num_columns keys each."""

    num_rows: int
    rows: torch.Tensor  # [n] int64: rows of the batch
    block_ids: torch.Tensor  # [n * blocks per sequence] int64
    num_columns: int
    # Rows of the gathered blocks' tokens that no token was stored in, to be zeroed; None where there are none.
    stale: torch.Tensor | None  # [*] int64
    # What is added to the scores, -inf in the columns that a sequence does not see; None where all see all.
    bias: torch.Tensor | None  # [n, 1, 1, num_columns] float32


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The groups of one step. Valid for every layer with the same window while the block tables do not change."""

    groups: tuple[DecodeGroup, ...]
    sliding_window: int | None


def plan_decode(
    block_tables: torch.Tensor,  # [B, max_blocks] int32
    seq_lens: torch.Tensor,  # [B] int32
    block_size: int,
    sliding_window: int | None = None,
) -> DecodePlan:
    """Group the sequences of a decode batch."""
    device = block_tables.device
    tables = block_tables.cpu().numpy()
    lengths = seq_lens.cpu().numpy().astype(np.int64)
    first_keys = np.zeros_like(lengths) if sliding_window is None else np.maximum(lengths - sliding_window, 0)
    first_blocks = first_keys // block_size
    # Columns count from the start of the first visible block.
    leads = first_keys - first_blocks * block_size
    ends = lengths - first_blocks * block_size

    groups = []
    for rows in _cut(ends):
        num_columns = int(ends[rows].max())
        num_blocks = -(-num_columns // block_size)
        # Beyond a shorter sequence's end its table holds anything: read its first block again, which is finite.
        wanted = first_blocks[rows, None] + np.arange(num_blocks)
        block_indices = np.where(wanted * block_size < lengths[rows, None], wanted, first_blocks[rows, None])
        block_ids = tables[rows[:, None], block_indices].astype(np.int64)
        positions = block_indices[:, :, None] * block_size + np.arange(block_size)
        stale = positions >= lengths[rows, None, None]
        stale.reshape(len(rows), -1)[:, num_columns:] = False  # never looked at
        columns = np.arange(num_columns)
        unseen = (columns < leads[rows, None]) | (columns >= ends[rows, None])
        groups.append(
            DecodeGroup(
                num_rows=len(rows),
                rows=torch.from_numpy(rows).to(device),
                block_ids=torch.from_numpy(block_ids.ravel()).to(device),
                num_columns=num_columns,
                stale=torch.from_numpy(np.flatnonzero(stale)).to(device) if stale.any() else None,
                bias=_bias(unseen).to(device) if unseen.any() else None,
            )
        )
    return DecodePlan(tuple(groups), sliding_window)


def _cut(num_columns: np.ndarray) -> list[np.ndarray]:
    """Rows in groups of like ``num_columns``; rows with none are in no group."""
    groups: list[np.ndarray] = []
    order = np.argsort(num_columns, kind="stable")
    sizes = num_columns[order].tolist()
    begin = next((i for i, size in enumerate(sizes) if size > 0), len(sizes))
    total = 0
    for i in range(begin, len(sizes) + 1):
        if i < len(sizes):
            padded = sizes[i] * (i + 1 - begin)
            padding = padded - total - sizes[i]
            if padded <= max(_MAX_GROUP_TOKENS, sizes[i]) and padding <= max(_PADDING_TOKENS, _PADDING_SHARE * padded):
                total += sizes[i]
                continue
        if i > begin:
            groups.append(np.sort(order[begin:i]))
        begin, total = i, sizes[i] if i < len(sizes) else 0
    return groups


def _bias(unseen: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(unseen, np.float32(-np.inf), np.float32(0)))[:, None, None]
