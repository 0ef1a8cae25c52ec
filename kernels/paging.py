"""What the torch attention paths share: reading a sequence's tokens out of the paged cache."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["attention_dtype", "cpu_computes_in", "gather_tokens"]


def gather_tokens(
    cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    block_table: torch.Tensor,  # [max_blocks] int32
    first: int,
    last: int,
) -> torch.Tensor:  # [last - first, num_kv_heads, head_dim]
    """The entries of positions ``first`` to ``last`` (exclusive) of one sequence, copied out of the cache."""
    block_size = cache.shape[1]
    first_block = first // block_size
    blocks = cache.index_select(0, block_table[first_block : -(-last // block_size)])
    return blocks.flatten(0, 1)[first - first_block * block_size : last - first_block * block_size]


@cache
def cpu_computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a 16-bit dtype; without them float32 is several times faster."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def attention_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype to do attention in: that of the queries, or float32 where the CPU computes 16-bit products slowly."""
    if q.dtype is torch.float32 or q.device.type != "cpu" or cpu_computes_in(q.dtype):
        return q.dtype
    return torch.float32
