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

from baton.kernels.attention_tile import LOG2_E, visit_keys
from baton.kernels.launch import dot_dtype, jit, next_power_of_2, select, tl
from baton.kernels.paging import attention_dtype, gather_tokens
from baton.kernels.tuning import attention_tiles

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


@jit
def _find_sequence(
    cu_seqlens_q_ptr: tl.tensor, tile: tl.tensor, num_seqs: tl.tensor, BLOCK_Q: tl.constexpr
) -> tl.tensor:
    """The sequence that a tile of queries belongs to: the last b with cu_seqlens_q[b] // BLOCK_Q + b <= tile.

    Sequence b is given the tiles from there to its successor's: at least as many as it needs, found without the host
    knowing any length.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@jit
def _prefill_attention_kernel(
    q_ptr: tl.tensor,  # [T, num_heads, head_dim]
    k_cache_ptr: tl.tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr: tl.tensor,  # the same strides
    block_tables_ptr: tl.tensor,  # [B, max_blocks] int32
    cu_seqlens_q_ptr: tl.tensor,  # [B + 1] int32
    seq_lens_ptr: tl.tensor,  # [B] int32
    out_ptr: tl.tensor,  # [T, num_heads, head_dim] contiguous
    num_seqs: tl.tensor,
    table_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,  # of the caches
    scale_log2: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # query tokens of a tile: BLOCK_M // group_size
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    num_heads: tl.constexpr,
    group_size: tl.constexpr,  # query heads per KV head
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
) -> None:
    # Grid: (T // BLOCK_Q + B, num_kv_heads). One program computes BLOCK_Q queries of one sequence for all query heads of
    # one KV head: they read the same keys. The tiles with the longest contexts start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _find_sequence(cu_seqlens_q_ptr, tile, num_seqs, BLOCK_Q)
    q_begin = tl.load(cu_seqlens_q_ptr + sequence)
    q_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - q_begin
    first_query = (tile - (q_begin // BLOCK_Q + sequence)) * BLOCK_Q
    if first_query >= q_len:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    first_position = seq_len - q_len + first_query
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1

    row = tl.arange(0, BLOCK_M)
    query = first_query + row // group_size
    head = kv_head * group_size + row % group_size
    row_mask = (row < BLOCK_Q * group_size) & (query < q_len)
    positions = first_position + row // group_size
    dim = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (dim[None, :] < head_dim)
    token = (q_begin + query).to(tl.int64)
    q_ptrs = q_ptr + token[:, None] * q_token_stride + head[:, None] * q_head_stride + dim[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0).to(DOT_DTYPE)

    k_ptr = k_cache_ptr + kv_head.to(tl.int64) * head_stride
    v_ptr = v_cache_ptr + kv_head.to(tl.int64) * head_stride
    block_table_ptr = block_tables_ptr + sequence.to(tl.int64) * table_stride
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    # Keys in three runs: those before every row's window began to close, those that all rows see, and the diagonal.
    begin = 0
    all_see_from = 0
    if HAS_WINDOW:
        begin = tl.maximum(0, first_position - window + 1) // BLOCK_N * BLOCK_N
        all_see_from = (tl.maximum(0, last_position - window + 1) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    diagonal = (first_position + 1) // BLOCK_N * BLOCK_N
    all_see_from = tl.minimum(tl.maximum(all_see_from, begin), tl.maximum(diagonal, begin))
    diagonal = tl.maximum(diagonal, all_see_from)
    if HAS_WINDOW:
        accumulator, row_max, row_sum = visit_keys(
            accumulator,
            row_max,
            row_sum,
            q,
            positions,
            begin,
            all_see_from,
            seq_len,
            k_ptr,
            v_ptr,
            block_table_ptr,
            block_stride,
            slot_stride,
            scale_log2,
            window,
            True,
            True,
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
        all_see_from,
        diagonal,
        seq_len,
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
        diagonal,
        last_position + 1,
        seq_len,
        k_ptr,
        v_ptr,
        block_table_ptr,
        block_stride,
        slot_stride,
        scale_log2,
        window,
        True,
        HAS_WINDOW,
        BLOCK_N,
        BLOCK_D,
        DOT_DTYPE,
        block_size,
        head_dim,
    )

    row_sum = tl.where(row_mask, row_sum, 1.0)
    out_ptrs = out_ptr + (token[:, None] * num_heads + head[:, None]) * head_dim + dim[None, :]
    tl.store(out_ptrs, (accumulator / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def _prefill_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group_size = num_heads // num_kv_heads
    if q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    tiles = attention_tiles("prefill", q.device, head_dim, q.dtype)
    block_m = max(tiles.block_m, next_power_of_2(group_size))
    block_q = block_m // group_size
    num_seqs = len(seq_lens)
    _prefill_attention_kernel[(num_tokens // block_q + num_seqs, num_kv_heads)](
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens,
        out,
        num_seqs,
        block_tables.stride(0),
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        scale * LOG2_E,
        sliding_window or 0,
        HAS_WINDOW=sliding_window is not None,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=tiles.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        DOT_DTYPE=dot_dtype(q.dtype),
        num_heads=num_heads,
        group_size=group_size,
        block_size=block_size,
        head_dim=head_dim,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
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
    return select(
        q.device,
        torch_path=_prefill_attention_torch,
        triton_path=_prefill_attention_triton,
        reference=prefill_attention_ref,
    )(q, k_cache, v_cache, block_tables, cu_seqlens_q, seq_lens, scale, sliding_window)
