"""A paged KV cache filled for a batch of sequences, with NaN wherever no token was stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.kernels.kv_store import store_kv_ref


@dataclass(frozen=True)
class PagedBatch:
    """Sequences in a cache whose blocks are scattered; every unused slot, block and table entry is poison."""

    k: list[torch.Tensor]  # per sequence [seq_len, num_kv_heads, head_dim]
    v: list[torch.Tensor]
    kv_cache: torch.Tensor  # [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]
    k_cache: torch.Tensor  # views of the second layer
    v_cache: torch.Tensor
    block_tables: torch.Tensor  # [B, max_blocks] int32; entries beyond a sequence's blocks name a block of NaN
    seq_lens: torch.Tensor  # [B] int32
    slots: torch.Tensor  # [sum of seq_lens] int64


def make_paged_batch(
    seq_lens: list[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
) -> PagedBatch:
    """Random keys and values of the given lengths, stored through a random block table."""
    num_blocks_of = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(num_blocks_of) + 3
    shape = (num_blocks, 2, 2, block_size, num_kv_heads, head_dim)
    kv_cache = torch.full(shape, float("nan"), dtype=dtype)
    k_cache, v_cache = kv_cache[:, 1, 0], kv_cache[:, 1, 1]
    order = torch.randperm(num_blocks, dtype=torch.int32)
    block_tables = torch.full((len(seq_lens), max(num_blocks_of, default=0) + 2), int(order[-1]), dtype=torch.int32)
    slots = []
    taken = 0
    for b, (length, count) in enumerate(zip(seq_lens, num_blocks_of, strict=True)):
        block_tables[b, :count] = order[taken : taken + count]
        taken += count
        position = torch.arange(length)
        slots.append(block_tables[b].long()[position // block_size] * block_size + position % block_size)
    k = [torch.randn(length, num_kv_heads, head_dim).to(dtype) for length in seq_lens]
    v = [torch.randn(length, num_kv_heads, head_dim).to(dtype) for length in seq_lens]
    all_slots = torch.cat(slots)
    store_kv_ref(torch.cat(k), torch.cat(v), k_cache, v_cache, all_slots)
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    return PagedBatch(k, v, kv_cache, k_cache, v_cache, block_tables, lengths, all_slots)
