"""Causal attention of prompt chunks over the paged cache, for a ragged batch.

Sequence b brings q_len_b new queries; its context of seq_len_b tokens (the cached prefix and the new tokens themselves)
is in the cache. Query i stands at position p = seq_len_b - q_len_b + i and sees the keys j with

    max(0, p - window + 1) <= j <= p

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j

Query head h reads key/value head h // (num_heads / num_kv_heads). Dao, "FlashAttention-2", 2023 (arXiv:2307.08691) for
the tiling; Kwon et al., 2023 (arXiv:2309.06180) for the paging. Nothing beyond seq_len_b is read: freed blocks hold stale
data, NaN included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.kernels.launch import select
from baton.kernels.paging import attention_dtype, gather_tokens

__all__ = ["prefill_attention", "prefill_attention_ref"]

# Queries per call where a mask is needed: the mask of a block against 32k keys is then 8 MiB.
_MASKED_QUERY_BLOCK = 256


def prefill_attention_ref(
    q: torch.Tensor,  # [T, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    block_tables: torch.Tensor,  # [B, max_blocks] int32
    cu_seqlens_q: torch.Tensor,  # [B + 1] int32
    seq_lens: torch.Tensor,  # [B] int32
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:  # [T, num_heads, head_dim]
    """The formula above in float32, one query after the other."""
    group = q.shape[1] // k_cache.shape[2]
    out = torch.empty_like(q)
    starts = cu_seqlens_q.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        k = gather_tokens(k_cache, block_tables[b], 0, seq_len).float().repeat_interleave(group, dim=1)
        v = gather_tokens(v_cache, block_tables[b], 0, seq_len).float().repeat_interleave(group, dim=1)
        q_len = starts[b + 1] - starts[b]
        for i in range(q_len):
            position = seq_len - q_len + i
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            keys, values = k[first : position + 1], v[first : position + 1]
            scores = scale * torch.einsum("hd,jhd->hj", q[starts[b] + i].float(), keys)
            out[starts[b] + i] = torch.einsum("hj,jhd->hd", scores.softmax(dim=-1), values).to(q.dtype)
    return out


def _attend(
    q: torch.Tensor,  # [q_len, num_heads, head_dim]
    k: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    v: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    scale: float,
    mask: torch.Tensor | None = None,  # [q_len, num_keys], True: visible
    is_causal: bool = False,
) -> torch.Tensor:  # [q_len, num_heads, head_dim]
    """Torch's fused attention, with its batch dimension and head order."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


def _prefill_attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    compute_dtype = attention_dtype(q)
    starts = cu_seqlens_q.tolist()
    for b, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[b], starts[b + 1]
        prefix = seq_len - (end - begin)
        first_key = 0 if sliding_window is None else max(0, prefix - sliding_window + 1)
        k = gather_tokens(k_cache, block_tables[b], first_key, seq_len).to(compute_dtype)
        v = gather_tokens(v_cache, block_tables[b], first_key, seq_len).to(compute_dtype)
        queries = q[begin:end].to(compute_dtype)
        if prefix == 0 and (sliding_window is None or seq_len <= sliding_window):
            out[begin:end] = _attend(queries, k, v, scale, is_causal=True)
            continue
        # Torch aligns its causal mask to the first key, so a cached prefix or a window needs a mask of its own. Blocks of
        # queries keep it small and leave out the keys that none of the block's queries sees.
        for block in range(prefix, seq_len, _MASKED_QUERY_BLOCK):
            block_end = min(block + _MASKED_QUERY_BLOCK, seq_len)
            low = 0 if sliding_window is None else max(0, block - sliding_window + 1)
            position = torch.arange(block, block_end, device=q.device).unsqueeze(1)
            key = torch.arange(low, block_end, device=q.device).unsqueeze(0)
            visible = key <= position
            if sliding_window is not None:
                visible &= key > position - sliding_window
            out[begin + block - prefix : begin + block_end - prefix] = _attend(
                queries[block - prefix : block_end - prefix],
                k[low - first_key : block_end - first_key],
                v[low - first_key : block_end - first_key],
                scale,
                mask=visible,
            )
    return out


def prefill_attention(
    q: torch.Tensor,  # [T, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], may be strided over blocks
    v_cache: torch.Tensor,  # the same shape and strides
    block_tables: torch.Tensor,  # [B, max_blocks] int32; entries beyond a sequence's context are not read
    cu_seqlens_q: torch.Tensor,  # [B + 1] int32, from 0 to T
    seq_lens: torch.Tensor,  # [B] int32: context with this chunk, whose keys and values are stored already
    scale: float,
    sliding_window: int | None = None,  # tokens, the query's own among them
) -> torch.Tensor:  # [T, num_heads, head_dim], contiguous
    """Attention of every query in a ragged batch to its sequence's context, causally."""
    return select(q.device, torch_path=_prefill_attention_torch, reference=prefill_attention_ref)(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, seq_lens, scale, sliding_window
    )
