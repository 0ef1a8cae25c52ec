"""Writing the keys and values of new tokens into the paged cache.

    k_cache[s // block_size, s % block_size] = k_t,    v_cache[...] = v_t,    s = slot_mapping_t

Paged caches: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023
(arXiv:2309.06180), section 4.
"""

from __future__ import annotations

import torch

from baton.kernels.launch import select

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


def store_kv(
    k: torch.Tensor,  # [T, num_kv_heads, head_dim], dtype of the cache
    v: torch.Tensor,  # [T, num_kv_heads, head_dim], dtype of the cache
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], may be strided over blocks
    v_cache: torch.Tensor,  # the same shape and strides
    slot_mapping: torch.Tensor,  # [T] int64: block_id * block_size + offset, each at most once
) -> None:
    """Write each token's key and value to its slot. Slots must lie inside the cache: the GPU path does not check."""
    select(k.device, torch_path=_store_kv_torch, reference=store_kv_ref)(k, v, k_cache, v_cache, slot_mapping)
