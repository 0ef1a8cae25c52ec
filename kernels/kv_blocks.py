"""Copying whole blocks between the paged cache and a contiguous buffer, for transfers.

    gather:   out[i] = kv_cache[block_ids_i]            scatter:   kv_cache[block_ids_i] = src[i]

A block spans all layers and is one contiguous run of bytes (see README.md), so both are row copies.
"""

from __future__ import annotations

import torch

from baton.kernels.launch import select

__all__ = ["gather_blocks", "gather_blocks_ref", "scatter_blocks", "scatter_blocks_ref"]


def gather_blocks_ref(kv_cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
    """One block after the other."""
    for row, block_id in enumerate(block_ids.tolist()):
        out[row] = kv_cache[block_id]


def scatter_blocks_ref(kv_cache: torch.Tensor, block_ids: torch.Tensor, src: torch.Tensor) -> None:
    """One block after the other."""
    for row, block_id in enumerate(block_ids.tolist()):
        kv_cache[block_id] = src[row]


def _gather_blocks_torch(kv_cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
    torch.index_select(kv_cache, 0, block_ids, out=out)


def _scatter_blocks_torch(kv_cache: torch.Tensor, block_ids: torch.Tensor, src: torch.Tensor) -> None:
    if kv_cache.is_cuda:
        kv_cache.index_copy_(0, block_ids.long(), src)
        return
    # On CPU index_copy_ moves element by element; a block is large enough to pay for a copy of its own.
    for row, block_id in enumerate(block_ids.tolist()):
        kv_cache[block_id].copy_(src[row])


def _check(kv_cache: torch.Tensor, block_ids: torch.Tensor, buffer: torch.Tensor) -> None:
    expected = (len(block_ids), *kv_cache.shape[1:])
    if buffer.shape != expected or buffer.dtype != kv_cache.dtype or not buffer.is_contiguous():
        raise ValueError(
            f"block buffer is {tuple(buffer.shape)} {buffer.dtype}; expected contiguous {expected} {kv_cache.dtype}"
        )


def gather_blocks(
    kv_cache: torch.Tensor,  # [num_blocks, *block_shape], contiguous
    block_ids: torch.Tensor,  # [n] int32 or int64, inside the cache
    out: torch.Tensor,  # [n, *block_shape], contiguous
) -> None:
    """Copy blocks into ``out``, in the order of ``block_ids``. Raises ValueError where ``out`` does not fit."""
    _check(kv_cache, block_ids, out)
    select(out.device, torch_path=_gather_blocks_torch, reference=gather_blocks_ref)(kv_cache, block_ids, out)


def scatter_blocks(
    kv_cache: torch.Tensor,  # [num_blocks, *block_shape], contiguous
    block_ids: torch.Tensor,  # [n] int32 or int64, inside the cache, each at most once
    src: torch.Tensor,  # [n, *block_shape], contiguous
) -> None:
    """Copy ``src`` into blocks of the cache: the inverse of ``gather_blocks``. Raises ValueError as it does."""
    _check(kv_cache, block_ids, src)
    select(src.device, torch_path=_scatter_blocks_torch, reference=scatter_blocks_ref)(kv_cache, block_ids, src)
