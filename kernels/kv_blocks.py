"""Copying whole blocks between the paged cache and a contiguous buffer, for transfers.

    gather:   out[i] = kv_cache[block_ids_i]            scatter:   kv_cache[block_ids_i] = src[i]

A block spans all layers and is one contiguous run of bytes (see README.md), so both are row copies.
"""

from __future__ import annotations

import torch

from baton.kernels.launch import cdiv, jit, select, tl

__all__ = ["gather_blocks", "gather_blocks_ref", "scatter_blocks", "scatter_blocks_ref"]

_BLOCK = 1024  # words of a program: 8 KiB
_MAX_BLOCKS_PER_LAUNCH = 65_535


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


@jit
def _copy_blocks_kernel(
    cache_ptr: tl.tensor,  # [num_blocks, num_words]
    block_ids_ptr: tl.tensor,  # [n]
    buffer_ptr: tl.tensor,  # [n, num_words]
    num_words: tl.tensor,  # of a block
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # Grid: (cdiv(num_words, BLOCK), n). One program copies BLOCK words of one block.
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    block_id = tl.load(block_ids_ptr + row).to(tl.int64)

    in_cache = cache_ptr + block_id * num_words + word
    in_buffer = buffer_ptr + row * num_words + word
    if GATHER:
        tl.store(in_buffer, tl.load(in_cache, mask=mask), mask=mask)
    else:
        tl.store(in_cache, tl.load(in_buffer, mask=mask), mask=mask)


def _words(blocks: torch.Tensor) -> torch.Tensor:
    """Contiguous blocks as rows of the widest integer that divides a block's bytes: a copy knows no element type."""
    rows = blocks.view(blocks.shape[0], -1)
    num_bytes = rows.shape[1] * rows.element_size()
    for word in (torch.int64, torch.int32, torch.int16):
        if num_bytes % word.itemsize == 0 and word.itemsize >= rows.element_size():
            return rows.view(word)
    return rows.view(torch.uint8)


def _copy_triton(kv_cache: torch.Tensor, block_ids: torch.Tensor, buffer: torch.Tensor, gather: bool) -> None:
    if buffer.numel() == 0:
        return
    cache_words, buffer_words = _words(kv_cache), _words(buffer)
    num_words = cache_words.shape[1]
    # The grid's second axis holds 65,535 programs.
    for begin in range(0, len(block_ids), _MAX_BLOCKS_PER_LAUNCH):
        ids = block_ids[begin : begin + _MAX_BLOCKS_PER_LAUNCH]
        _copy_blocks_kernel[(cdiv(num_words, _BLOCK), len(ids))](
            cache_words, ids, buffer_words[begin:], num_words, GATHER=gather, BLOCK=_BLOCK, num_warps=4
        )


def _gather_blocks_triton(kv_cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor) -> None:
    _copy_triton(kv_cache, block_ids, out, gather=True)


def _scatter_blocks_triton(kv_cache: torch.Tensor, block_ids: torch.Tensor, src: torch.Tensor) -> None:
    _copy_triton(kv_cache, block_ids, src, gather=False)


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
    select(out.device, torch_path=_gather_blocks_torch, triton_path=_gather_blocks_triton, reference=gather_blocks_ref)(
        kv_cache, block_ids, out
    )


def scatter_blocks(
    kv_cache: torch.Tensor,  # [num_blocks, *block_shape], contiguous
    block_ids: torch.Tensor,  # [n] int32 or int64, inside the cache, each at most once
    src: torch.Tensor,  # [n, *block_shape], contiguous
) -> None:
    """Copy ``src`` into blocks of the cache: the inverse of ``gather_blocks``. Raises ValueError as it does."""
    _check(kv_cache, block_ids, src)
    select(
        src.device, torch_path=_scatter_blocks_torch, triton_path=_scatter_blocks_triton, reference=scatter_blocks_ref
    )(kv_cache, block_ids, src)
