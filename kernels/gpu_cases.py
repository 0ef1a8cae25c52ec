"""What ``gpu_check`` runs: every op on small awkward shapes, to compare, and on those of an 8B model, to time.

The large shapes are Llama-3.1-8B's: hidden size 4,096, intermediate size 14,336, 32 query and 8 KV heads of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from baton import kernels

__all__ = ["CASES", "Case", "Problem"]

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of an op."""

    shape: str
    call: Callable[[], object]
    num_bytes: int = 0  # that must be read and written at least
    num_flops: int = 0
    written: torch.Tensor | None = None  # where the result is, of an op that returns none


@dataclass(frozen=True, slots=True)
class Case:
    """An op and its problems: ``build(device, dtype, small)``."""

    name: str
    build: Callable[[torch.device, torch.dtype, bool], Iterator[Problem]]


def _size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _randn(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def _norms(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    for rows, hidden in ((3, 123), (1, 1), (5, 1030)) if small else ((4096, 4096), (64, 4096)):
        x, residual = _randn(device, dtype, rows, hidden), _randn(device, dtype, rows, hidden)
        weight, bias = _randn(device, dtype, hidden), _randn(device, dtype, hidden)
        shape = f"{rows}x{hidden}"
        add_norm = partial(kernels.fused_add_rms_norm, x, residual, weight, 1e-5)
        yield Problem(f"rms {shape}", partial(kernels.rms_norm, x, weight, 1e-5), 2 * _size(x))
        yield Problem(f"add+rms {shape}", add_norm, 4 * _size(x))
        yield Problem(f"layer {shape}", partial(kernels.layer_norm, x, weight, bias, 1e-5), 2 * _size(x))


def _activations(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    for rows, size in ((3, 41), (2, 1030)) if small else ((4096, 14336), (64, 14336)):
        x = _randn(device, dtype, rows, 2 * size)
        gated_bytes = _size(x) * 3 // 2
        yield Problem(f"silu*up {rows}x{size}", partial(kernels.silu_and_mul, x), gated_bytes)
        yield Problem(f"gelu*up {rows}x{size}", partial(kernels.gelu_and_mul, x, "tanh"), gated_bytes)
        yield Problem(f"gelu {rows}x{2 * size}", partial(kernels.gelu, x), 2 * _size(x))


def _rope(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    num_tokens, num_heads, num_kv_heads, head_dim = (7, 9, 3, 20) if small else (4096, 32, 8, 128)
    projection = _randn(device, dtype, num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k = projection[:, :num_heads], projection[:, num_heads : num_heads + num_kv_heads]
    inverse_frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    cos_sin = kernels.build_rope_cache(inverse_frequencies, 8192, 1.0, torch.float32)
    positions = torch.randint(8192, (num_tokens,), device=device)
    yield Problem(
        f"{num_tokens} tokens, {num_heads}+{num_kv_heads} heads",
        partial(kernels.rotary_embedding, q, k, positions, cos_sin),
        2 * _size(q, k),
    )


def _store(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    num_tokens, num_kv_heads, head_dim = (17, 3, 20) if small else (4096, 8, 128)
    num_blocks = 4 * (-(-num_tokens // _BLOCK_SIZE))
    cache = torch.zeros((num_blocks, 2, 2, _BLOCK_SIZE, num_kv_heads, head_dim), device=device, dtype=dtype)
    k, v = (_randn(device, dtype, num_tokens, num_kv_heads, head_dim) for _ in range(2))
    slots = torch.randperm(num_blocks * _BLOCK_SIZE, device=device)[:num_tokens]
    yield Problem(
        f"{num_tokens} tokens, {num_kv_heads} heads",
        partial(kernels.store_kv, k, v, cache[:, 1, 0], cache[:, 1, 1], slots),
        4 * _size(k),
        written=cache,
    )


def _blocks(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    n, *block = (5, 2, 2, _BLOCK_SIZE, 3, 20) if small else (512, 32, 2, _BLOCK_SIZE, 8, 128)
    cache, buffer = _randn(device, dtype, 2 * n, *block), _randn(device, dtype, n, *block)
    ids = torch.randperm(2 * n, device=device)[:n]
    shape = f"{n} of {_size(buffer) // n // 1024} KiB"
    for name, op, source, target in (
        ("gather", kernels.gather_blocks, cache, torch.empty_like(buffer)),
        ("scatter", kernels.scatter_blocks, buffer, torch.empty_like(cache)),
    ):
        args = (source, ids, target) if name == "gather" else (target, ids, source)
        yield Problem(f"{name} {shape}", partial(op, *args), 2 * _size(buffer), written=target)


@dataclass(frozen=True, slots=True)
class _Paged:
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor


def _paged(device: torch.device, dtype: torch.dtype, lengths: list[int], num_kv_heads: int, head_dim: int) -> _Paged:
    """A batch's cache, its blocks scattered, with NaN in every slot without a token."""
    counts = [-(-length // _BLOCK_SIZE) for length in lengths]
    num_blocks = sum(counts) + 1
    shape = (num_blocks, 1, 2, _BLOCK_SIZE, num_kv_heads, head_dim)
    cache = torch.full(shape, float("nan"), device=device, dtype=dtype)
    order = torch.randperm(num_blocks, device=device, dtype=torch.int32)
    tables = order[-1].expand(len(lengths), max(counts) + 1).contiguous()
    taken = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[b, :count] = order[taken : taken + count]
        taken += count
        position = torch.arange(length, device=device)
        block, offset = tables[b].long()[position // _BLOCK_SIZE], position % _BLOCK_SIZE
        cache[block, 0, :, offset] = _randn(device, dtype, length, 2, num_kv_heads, head_dim)
    seq_lens = torch.tensor(lengths, device=device, dtype=torch.int32)
    return _Paged(cache[:, 0, 0], cache[:, 0, 1], tables, seq_lens)


def _prefill(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    num_heads, num_kv_heads, head_dim = (6, 2, 20) if small else (32, 8, 128)
    batches: tuple[tuple[list[tuple[int, int]], int | None], ...] = (
        (([(40, 23), (17, 17), (33, 1)], None), ([(40, 23), (17, 17)], 9))
        if small
        else (([(8192, 8192)], None), ([(2048, 2048)] * 4, None), ([(8192, 512)], None), ([(8192, 8192)], 1024))
    )
    for batch, window in batches:
        paged = _paged(device, dtype, [context for context, _ in batch], num_kv_heads, head_dim)
        starts = torch.tensor([0, *(new for _, new in batch)], device=device).cumsum(0).int()
        q = _randn(device, dtype, int(starts[-1]), num_heads, head_dim)
        seen = sum(min(p + 1, window or p + 1) for context, new in batch for p in range(context - new, context))
        yield Problem(
            f"{len(batch)} x {batch[0][1]} on {batch[0][0]}" + (f" window {window}" if window else ""),
            partial(
                kernels.prefill_attention,
                q,
                paged.k_cache,
                paged.v_cache,
                paged.block_tables,
                starts,
                paged.seq_lens,
                head_dim**-0.5,
                window,
            ),
            num_flops=4 * seen * num_heads * head_dim,
        )


def _decode(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    num_heads, num_kv_heads, head_dim = (6, 2, 20) if small else (32, 8, 128)
    batches: tuple[tuple[list[int], int | None], ...] = (
        (([70, 1, 16], None), ([70, 3], 18))
        if small
        else (([32768], None), ([4096] * 16, None), ([4096] * 64, None), ([1024] * 256, None), ([8192] * 64, 1024))
    )
    for lengths, window in batches:
        paged = _paged(device, dtype, lengths, num_kv_heads, head_dim)
        q = _randn(device, dtype, len(lengths), num_heads, head_dim)
        num_keys = sum(min(length, window or length) for length in lengths)
        yield Problem(
            f"{len(lengths)} on {lengths[0]}" + (f" window {window}" if window else ""),
            partial(
                kernels.decode_attention,
                q,
                paged.k_cache,
                paged.v_cache,
                paged.block_tables,
                paged.seq_lens,
                head_dim**-0.5,
                window,
            ),
            2 * num_keys * num_kv_heads * head_dim * dtype.itemsize + 2 * _size(q),
        )


def _sampling(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    batch, vocab_size = (4, 300) if small else (64, 128_256)
    logits = 3 * _randn(device, dtype, batch, vocab_size)
    for name, temperature, top_k, top_p, min_p in (
        ("greedy", 0.0, 0, 1.0, 0.0),
        ("temperature", 1.0, 0, 1.0, 0.0),
        ("top-p", 1.0, 0, 0.9, 0.0),
        ("top-k, top-p, min-p", 0.8, 50, 0.9, 0.02),
    ):
        params = kernels.SamplingTensors(
            temperature=torch.full((batch,), temperature, device=device),
            top_k=torch.full((batch,), top_k, device=device, dtype=torch.int32),
            top_p=torch.full((batch,), top_p, device=device),
            min_p=torch.full((batch,), min_p, device=device),
            seed=torch.arange(batch, device=device),
            position=torch.arange(batch, device=device),
        )
        yield Problem(f"{name}, {batch}x{vocab_size}", partial(kernels.sample, logits, params), _size(logits))


CASES = (
    Case("norm", _norms),
    Case("activation", _activations),
    Case("rope", _rope),
    Case("kv_store", _store),
    Case("kv_blocks", _blocks),
    Case("prefill_attention", _prefill),
    Case("decode_attention", _decode),
    Case("sampling", _sampling),
)
