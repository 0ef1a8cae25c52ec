"""Attention of one new token per sequence over the paged cache.

    out_b = sum_j softmax_j(scale * q_b . k_j) v_j,    max(0, seq_len_b - window) <= j < seq_len_b

Query head h reads key/value head h // (num_heads / num_kv_heads). Nothing outside that range of positions has any
influence: freed blocks hold stale data, NaN included, so what is left out is left out of the sum and not multiplied by
zero. A row with seq_len 0 gives zeros.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from baton.kernels.decode_plan import DecodeGroup, DecodePlan, plan_decode
from baton.kernels.launch import select
from baton.kernels.paging import attention_dtype, gather_tokens

__all__ = ["decode_attention", "decode_attention_ref"]


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
    """A group's keys or values, [n, num_columns, num_kv_heads, head_dim]."""
    blocks = cache.index_select(0, group.block_ids).to(dtype)
    return blocks.view(len(group.rows), -1, *cache.shape[2:])[:, : group.num_columns]


def _attend_group(
    q: torch.Tensor,  # [n, num_kv_heads, queries per KV head, head_dim], scaled
    k: torch.Tensor,  # [n, num_columns, num_kv_heads, head_dim]
    v: torch.Tensor,  # [n, num_columns, num_kv_heads, head_dim]; its masked columns are overwritten
    masks: tuple[tuple[int, torch.Tensor], ...],
) -> torch.Tensor:  # like q
    """Two batched matrix products with a softmax between.

    Torch's product takes one batch dimension and copies its operands to get it, so the longer of sequences and KV heads
    is the batch and the shorter a loop: reading strided operands costs nothing, copying the keys would double the work.
    """
    n, num_kv_heads, num_queries, head_dim = q.shape
    over_heads = n >= num_kv_heads
    queries, keys, values = q, k.transpose(1, 2), v.transpose(1, 2)  # [n, num_kv_heads, ...]
    if over_heads:
        queries, keys, values = (t.transpose(0, 1) for t in (queries.contiguous(), keys, values))
    outer, inner = queries.shape[:2]
    scores = torch.empty((outer, inner, num_queries, k.shape[1]), dtype=q.dtype, device=q.device)
    for i in range(outer):
        torch.bmm(queries[i], keys[i].transpose(1, 2), out=scores[i])
    for first, mask in masks:
        columns = slice(first, first + mask.shape[1])
        per_sequence = mask[None, :, None] if over_heads else mask[:, None, None]
        scores[..., columns].masked_fill_(per_sequence, -math.inf)
        v[:, columns].masked_fill_(mask[..., None, None], 0)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    out = torch.empty((outer, inner, num_queries, head_dim), dtype=q.dtype, device=q.device)
    for i in range(outer):
        torch.bmm(probabilities[i], values[i], out=out[i])
    return out.transpose(0, 1) if over_heads else out


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
    if plan is None or plan.sliding_window != sliding_window:
        plan = plan_decode(block_tables, seq_lens, k_cache.shape[1], sliding_window)
    num_kv_heads = k_cache.shape[2]
    dtype = attention_dtype(q)
    grouped_heads = (num_kv_heads, q.shape[1] // num_kv_heads, q.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.has_empty_rows:
        out.zero_()
    for group in plan.groups:
        n = len(group.rows)
        whole = n == len(q)  # rows of a group are in ascending order
        queries = (q if whole else q.index_select(0, group.rows)).to(dtype) * scale
        k = _gather_group(k_cache, group, dtype)
        v = _gather_group(v_cache, group, dtype)
        result = _attend_group(queries.view(n, *grouped_heads), k, v, group.masks)
        if whole:
            out.view(n, *grouped_heads).copy_(result)
        else:
            out.index_copy_(0, group.rows, result.reshape(n, *q.shape[1:]).to(q.dtype))
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
    return select(q.device, torch_path=_decode_attention_torch, reference=_reference)(
        q, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, plan
    )
