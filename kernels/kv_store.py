"""Writing the keys and values of new tokens into the paged cache.

    k_cache[s // block_size, s % block_size] = k_t,    v_cache[...] = v_t,    s = slot_mapping_t

Paged caches: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023
(arXiv:2309.06180), section 4.
"""

from __future__ import annotations

import torch

from baton.kernels.launch import jit, next_power_of_2, select, tl
from baton.kernels.tuning import num_warps_for_row

__all__ = ["store_kv", "store_kv_ref"]


def store_kv_ref(
    k: torch.Tensor,  # [T, num_kv_heads, head_dim]
    v: torch.Tensor,  # [T, num_kv_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    slot_mapping: torch.Tensor,  # [T] int64
) -> None:
    """One token after the other."""
    block_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        k_cache[slot // block_size, slot % block_size] = k[token]
        v_cache[slot // block_size, slot % block_size] = v[token]


def _store_kv_torch(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    block_size = k_cache.shape[1]
    index = (slot_mapping // block_size, slot_mapping % block_size)
    k_cache.index_put_(index, k)
    v_cache.index_put_(index, v)


@jit
def _store_kv_kernel(
    k_ptr: tl.tensor,  # [T, row]
    v_ptr: tl.tensor,  # [T, row]
    k_cache_ptr: tl.tensor,  # [num_blocks, block_size, row]
    v_cache_ptr: tl.tensor,  # the same strides
    slot_mapping_ptr: tl.tensor,  # [T] int64
    k_token_stride: tl.tensor,
    v_token_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK: tl.constexpr,  # power of two >= row
    block_size: tl.constexpr,
    row: tl.constexpr,  # num_kv_heads * head_dim
) -> None:
    # Grid: (T,). One program writes the key and the value of one token.
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    element = tl.arange(0, BLOCK)
    mask = element < row

    target = (slot // block_size) * block_stride + (slot % block_size) * slot_stride + element
    tl.store(k_cache_ptr + target, tl.load(k_ptr + token * k_token_stride + element, mask=mask), mask=mask)
    tl.store(v_cache_ptr + target, tl.load(v_ptr + token * v_token_stride + element, mask=mask), mask=mask)


def _store_kv_triton(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    num_tokens = k.shape[0]
    row = k.shape[1] * k.shape[2]
    if num_tokens == 0:
        return
    k, v = k.flatten(1), v.flatten(1)  # views, of slices of a projection too
    block = next_power_of_2(row)
    _store_kv_kernel[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        BLOCK=block,
        block_size=k_cache.shape[1],
        row=row,
        num_warps=num_warps_for_row(block),
    )


def store_kv(
    k: torch.Tensor,  # [T, num_kv_heads, head_dim], dtype of the cache
    v: torch.Tensor,  # [T, num_kv_heads, head_dim], dtype of the cache
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], may be strided over blocks
    v_cache: torch.Tensor,  # the same shape and strides
    slot_mapping: torch.Tensor,  # [T] int64: block_id * block_size + offset, each at most once
) -> None:
    """Write each token's key and value to its slot. Slots must lie inside the cache: the GPU path does not check."""
    select(k.device, torch_path=_store_kv_torch, triton_path=_store_kv_triton, reference=store_kv_ref)(
        k, v, k_cache, v_cache, slot_mapping
    )
