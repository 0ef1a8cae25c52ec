"""Attention of one new token per sequence over the paged cache.

    out_b = sum_j softmax_j(scale * q_b . k_j) v_j,    max(0, seq_len_b - window) <= j < seq_len_b

Query head h reads key/value head h // (num_heads / num_kv_heads). Nothing outside that range of positions has any
influence: freed blocks hold stale data, NaN included, so what is left out is left out of the sum and not multiplied by
zero. A row with seq_len 0 gives zeros.

On GPU the keys of a sequence are split between programs, each giving its normalised output o_s and L_s = log2(sum of its
weights); the second kernel merges them:

    out = sum_s 2^(L_s - L) o_s / sum_s 2^(L_s - L),    L = max_s L_s

Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from baton.kernels.attention_tile import LOG2_E, visit_keys
from baton.kernels.decode_plan import DecodeGroup, DecodePlan, plan_decode
from baton.kernels.launch import cdiv, dot_dtype, jit, next_power_of_2, select, tl
from baton.kernels.paging import gather_tokens
from baton.kernels.tuning import attention_tiles, target_programs

__all__ = ["decode_attention", "decode_attention_ref"]

_MAX_SPLITS = 64  # a merging program holds all shares of a head
_MIN_TILES_PER_SPLIT = 4  # less work than this does not pay for its program and its part of the merge


def decode_attention_ref(
    q: torch.Tensor,  # [B, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    block_tables: torch.Tensor,  # [B, max_blocks] int32
    seq_lens: torch.Tensor,  # [B] int32
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:  # [B, num_heads, head_dim]
    """The formula above in float32, one sequence after the other."""
    group = q.shape[1] // k_cache.shape[2]
    out = torch.zeros_like(q)
    for b, seq_len in enumerate(seq_lens.tolist()):
        if seq_len == 0:
            continue
        first = 0 if sliding_window is None else max(0, seq_len - sliding_window)
        k = gather_tokens(k_cache, block_tables[b], first, seq_len).float().repeat_interleave(group, dim=1)
        v = gather_tokens(v_cache, block_tables[b], first, seq_len).float().repeat_interleave(group, dim=1)
        scores = scale * torch.einsum("hd,jhd->hj", q[b].float(), k)
        out[b] = torch.einsum("hj,jhd->hd", scores.softmax(dim=-1), v).to(q.dtype)
    return out


def _reference(*args: Any) -> torch.Tensor:
    return decode_attention_ref(*args[:-1])  # without the plan


def _gather_group(cache: torch.Tensor, group: DecodeGroup, dtype: torch.dtype) -> torch.Tensor:
    """A group's keys or values, [n, num_kv_heads, num_columns, head_dim] over a copy; zeros where nothing was stored."""
    tokens = cache.index_select(0, group.block_ids).to(dtype).flatten(0, 1)
    if group.stale is not None:
        tokens.index_fill_(0, group.stale, 0)
    return tokens.view(group.num_rows, -1, *cache.shape[2:])[:, : group.num_columns].transpose(1, 2)


def _decode_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """Torch's fused attention once per group of the plan.

    The query heads that share a KV head go in as that head's queries: they see the same keys, so nothing is expanded
    and each key is read once. On CPU in float32 whatever the dtype: one token's products are bound by calls and memory,
    and the 16-bit ones cost more calls.
    """
    if plan is None or plan.sliding_window != sliding_window:
        plan = plan_decode(block_tables, seq_lens, k_cache.shape[1], sliding_window)
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype
    queries = q.to(dtype).reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = None
    for group in plan.groups:
        whole = group.num_rows == batch  # rows of a group are in ascending order
        result = F.scaled_dot_product_attention(
            queries if whole else queries.index_select(0, group.rows),
            _gather_group(k_cache, group, dtype),
            _gather_group(v_cache, group, dtype),
            attn_mask=None if group.bias is None else group.bias.to(dtype),
            scale=scale,
        )
        result = result.reshape(group.num_rows, num_heads, head_dim).to(q.dtype)
        if whole:
            return result
        if out is None:
            out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        out.index_copy_(0, group.rows, result)
    return torch.zeros(q.shape, dtype=q.dtype, device=q.device) if out is None else out


@jit
def _decode_attention_kernel(
    q_ptr: tl.tensor,  # [B, num_heads, head_dim]
    k_cache_ptr: tl.tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr: tl.tensor,  # the same strides
    block_tables_ptr: tl.tensor,  # [B, max_blocks] int32
    seq_lens_ptr: tl.tensor,  # [B] int32
    partial_ptr: tl.tensor,  # [B, num_heads, num_splits, head_dim]: float32, or the output itself with one split
    partial_lse_ptr: tl.tensor,  # [B, num_heads, num_splits] float32, base 2
    table_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,  # of the caches
    scale_log2: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,  # power of two >= group_size
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    num_splits: tl.constexpr,
    num_heads: tl.constexpr,
    group_size: tl.constexpr,  # query heads per KV head
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
) -> None:
    # Grid: (B, num_kv_heads, num_splits). One program lets all query heads of one KV head see one share of the keys.
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + sequence)
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(0, seq_len - window)
    share = tl.cdiv(tl.cdiv(seq_len - first_key, num_splits), BLOCK_N) * BLOCK_N
    begin = first_key + split * share
    end = tl.minimum(begin + share, seq_len)
    whole_tiles_end = begin + tl.maximum(0, end - begin) // BLOCK_N * BLOCK_N

    row = tl.arange(0, BLOCK_M)
    head = kv_head * group_size + row
    dim = tl.arange(0, BLOCK_D)
    mask = (row < group_size)[:, None] & (dim < head_dim)[None, :]
    q_ptrs = q_ptr + sequence * q_token_stride + head[:, None] * q_head_stride + dim[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0).to(DOT_DTYPE)

    positions = tl.zeros([BLOCK_M], dtype=tl.int32) + end - 1
    k_ptr = k_cache_ptr + kv_head * head_stride
    v_ptr = v_cache_ptr + kv_head * head_stride
    block_table_ptr = block_tables_ptr + sequence * table_stride
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    accumulator, row_max, row_sum = visit_keys(
        accumulator,
        row_max,
        row_sum,
        q,
        positions,
        begin,
        whole_tiles_end,
        end,
        k_ptr,
        v_ptr,
        block_table_ptr,
        block_stride,
        slot_stride,
        scale_log2,
        window,
        False,
        False,
        BLOCK_N,
        BLOCK_D,
        DOT_DTYPE,
        block_size,
        head_dim,
    )
    accumulator, row_max, row_sum = visit_keys(
        accumulator,
        row_max,
        row_sum,
        q,
        positions,
        whole_tiles_end,
        end,
        end,
        k_ptr,
        v_ptr,
        block_table_ptr,
        block_stride,
        slot_stride,
        scale_log2,
        window,
        True,
        False,
        BLOCK_N,
        BLOCK_D,
        DOT_DTYPE,
        block_size,
        head_dim,
    )

    # A share without keys: zeros, with a log-sum of -inf.
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    out = accumulator / total[:, None]
    partial = (sequence * num_heads + head) * num_splits + split
    tl.store(partial_ptr + partial[:, None] * head_dim + dim[None, :], out.to(partial_ptr.dtype.element_ty), mask=mask)
    if num_splits > 1:
        tl.store(partial_lse_ptr + partial, row_max + tl.log2(total), mask=row < group_size)


@jit
def _merge_splits_kernel(
    partial_ptr: tl.tensor,  # [B * num_heads, num_splits, head_dim] float32
    partial_lse_ptr: tl.tensor,  # [B * num_heads, num_splits] float32, base 2
    out_ptr: tl.tensor,  # [B * num_heads, head_dim]
    BLOCK_S: tl.constexpr,  # power of two >= num_splits
    BLOCK_D: tl.constexpr,
    num_splits: tl.constexpr,
    head_dim: tl.constexpr,
) -> None:
    # Grid: (B * num_heads,). One program merges the shares of one head of one sequence.
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    mask = (split < num_splits)[:, None] & (dim < head_dim)[None, :]
    lse = tl.load(partial_lse_ptr + row * num_splits + split, mask=split < num_splits, other=float("-inf"))
    highest = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    partial_ptrs = partial_ptr + (row * num_splits + split[:, None]) * head_dim + dim[None, :]
    partial = tl.load(partial_ptrs, mask=mask, other=0.0)
    total = tl.sum(weights, axis=0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * head_dim + dim, out.to(out_ptr.dtype.element_ty), mask=dim < head_dim)


def _num_splits(q: torch.Tensor, num_kv_heads: int, max_keys: int, block_n: int) -> int:
    """Enough shares to fill the device, each of at least four tiles. From shapes alone: no length is read back."""
    wanted = cdiv(target_programs(q.device), q.shape[0] * num_kv_heads)
    return max(1, min(wanted, cdiv(max_keys, _MIN_TILES_PER_SPLIT * block_n), _MAX_SPLITS))


def _decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group_size = num_heads // num_kv_heads
    if q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    tiles = attention_tiles("decode", q.device, head_dim, q.dtype)
    max_keys = block_tables.shape[1] * block_size
    if sliding_window is not None:
        max_keys = min(max_keys, sliding_window)
    num_splits = _num_splits(q, num_kv_heads, max_keys, tiles.block_n)
    block_d = max(16, next_power_of_2(head_dim))
    partial = out
    lse = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=q.device)
    if num_splits > 1:
        partial = torch.empty((batch, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
    _decode_attention_kernel[(batch, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        partial,
        lse,
        block_tables.stride(0),
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        scale * LOG2_E,
        sliding_window or 0,
        HAS_WINDOW=sliding_window is not None,
        BLOCK_M=max(tiles.block_m, next_power_of_2(group_size)),
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_d,
        DOT_DTYPE=dot_dtype(q.dtype),
        num_splits=num_splits,
        num_heads=num_heads,
        group_size=group_size,
        block_size=block_size,
        head_dim=head_dim,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits > 1:
        _merge_splits_kernel[(batch * num_heads,)](
            partial,
            lse,
            out,
            BLOCK_S=next_power_of_2(num_splits),
            BLOCK_D=block_d,
            num_splits=num_splits,
            head_dim=head_dim,
            num_warps=4,
        )
    return out


def decode_attention(
    q: torch.Tensor,  # [B, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], may be strided over blocks
    v_cache: torch.Tensor,  # the same shape and strides
    block_tables: torch.Tensor,  # [B, max_blocks] int32; entries beyond a sequence's context are not read
    seq_lens: torch.Tensor,  # [B] int32: context with the new token, whose key and value are stored already
    scale: float,
    sliding_window: int | None = None,  # tokens, the query's own among them
    plan: DecodePlan | None = None,  # plan_decode of the same arguments, to share it between layers on CPU
) -> torch.Tensor:  # [B, num_heads, head_dim], contiguous
    """Attention of each sequence's newest token to its context."""
    return select(
        q.device, torch_path=_decode_attention_torch, triton_path=_decode_attention_triton, reference=_reference
    )(q, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, plan)
