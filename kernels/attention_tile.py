"""The loop that both attention kernels share: online softmax over tiles of paged keys.

For a tile of rows with running maximum m, sum s and accumulator a, a tile of scores x (in base 2) and values v gives

    m' = max(m, max_j x_j),   p_j = 2^(x_j - m'),   s' = s 2^(m - m') + sum_j p_j,   a' = a 2^(m - m') + sum_j p_j v_j

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867), algorithm 3; base 2 because
the hardware's exponential is exp2.
"""

from __future__ import annotations

from baton.kernels.launch import jit, tl

__all__ = ["LOG2_E", "visit_keys"]

LOG2_E = 1.4426950408889634


@jit
def visit_keys(
    accumulator: tl.tensor,  # [BLOCK_M, BLOCK_D] float32
    row_max: tl.tensor,  # [BLOCK_M] float32
    row_sum: tl.tensor,  # [BLOCK_M] float32
    q: tl.tensor,  # [BLOCK_M, BLOCK_D] of DOT_DTYPE
    positions: tl.tensor,  # [BLOCK_M]: a row sees the keys up to and with its position
    begin: tl.tensor,  # keys to visit: begin to end, in tiles of BLOCK_N
    end: tl.tensor,
    context_end: tl.tensor,  # nothing is read from here on
    k_ptr: tl.tensor,  # the KV head's part of k_cache[0, 0]
    v_ptr: tl.tensor,
    block_table_ptr: tl.tensor,  # the sequence's [max_blocks] int32
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    scale_log2: tl.tensor,  # softmax scale times log2(e)
    window: tl.tensor,  # with HAS_WINDOW: a row sees this many keys
    MASKED: tl.constexpr,  # False: every row sees every key from begin to end
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two >= head_dim
    DOT_DTYPE: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Let every row see the keys from ``begin`` to ``end``. Returns the new accumulator, maximum and sum."""
    dim = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_context = keys < context_end
        block_ids = tl.load(block_table_ptr + keys // block_size, mask=in_context, other=0).to(tl.int64)
        offsets = block_ids * block_stride + (keys % block_size) * slot_stride
        k_ptrs = k_ptr + offsets[None, :] + dim[:, None]
        v_ptrs = v_ptr + offsets[:, None] + dim[None, :]
        if MASKED or head_dim < BLOCK_D:
            # Stale entries are not read at all: a NaN times a weight of zero would still be a NaN.
            k = tl.load(k_ptrs, mask=in_context[None, :] & (dim[:, None] < head_dim), other=0.0)
            v = tl.load(v_ptrs, mask=in_context[:, None] & (dim[None, :] < head_dim), other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)

        scores = tl.dot(q, k.to(DOT_DTYPE), input_precision="ieee") * scale_log2
        if MASKED:
            visible = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible &= keys[None, :] > positions[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # A row that has seen no key yet has a maximum of -inf, and -inf minus -inf is not zero.
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(row_max - reference)
        row_sum = row_sum * decay + tl.sum(weights, axis=1)
        accumulator = accumulator * decay[:, None]
        accumulator += tl.dot(weights.to(DOT_DTYPE), v.to(DOT_DTYPE), input_precision="ieee")
        row_max = new_max
    return accumulator, row_max, row_sum
