"""The Triton kernel of sampling.py: one program draws one row, with no sort and nothing stored between its passes.

The kept set of a row is a prefix of its tokens in descending order, so it is given by its smallest logit and by how many
tokens of exactly that value are kept. The smallest logit is found by searching the float32 numbers themselves: as
integers in the right order, from the row's largest logit down. Each pass over the row weighs four candidates, which
leaves a fifth of the range; sums are integers, so the result is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from baton.kernels.launch import jit, next_power_of_2, tl

if TYPE_CHECKING:
    from baton.kernels.sampling import SamplingTensors

__all__ = ["sample_triton"]

_MAX_BLOCK = 2048  # logits of a tile: 8 a thread, since the search holds 2 * _PIVOTS sums for each
_PIVOTS = 4
_LOWEST_KEY = -0x7F800001  # _order_key(-inf)


@jit
def _order_key(x: tl.tensor) -> tl.tensor:
    """float32 as int32 in the same order, both zeros being one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _weights(x: tl.tensor, highest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """floor(2^32 exp((x - highest) / temperature)), as sampling.py defines it; 0 where x is NaN."""
    below = x < highest  # not a subtraction of equal infinities
    distance = (tl.where(below, x, 0.0) - tl.where(below, highest, 0.0)) / temperature
    return tl.where(below | (x == highest), tl.exp(distance) * 4294967296.0, 0.0).to(tl.int64)


@jit
def _weight_of_key(key: tl.tensor, highest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    bits = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.int32)
    return _weights(bits.to(tl.float32, bitcast=True), highest, temperature)


@jit
def _above(
    row_ptr: tl.tensor,  # [vocab_size]
    key: tl.tensor,
    highest: tl.tensor,
    temperature: tl.tensor,
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Number and weight of the tokens whose key is above ``key``."""
    count = tl.zeros([BLOCK], dtype=tl.int32)
    weight = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        above = (_order_key(x) > key) & (token < vocab_size)
        count += above.to(tl.int32)
        weight += tl.where(above, _weights(x, highest, temperature), 0)
    return tl.sum(count, axis=0), tl.sum(weight, axis=0)


@jit
def _smallest_kept(
    row_ptr: tl.tensor,  # [vocab_size]
    highest: tl.tensor,
    temperature: tl.tensor,
    max_count: tl.tensor,  # int32: a token is kept with fewer tokens than this above it,
    max_weight: tl.tensor,  # float64: less weight than this above it,
    min_weight: tl.tensor,  # float64: and at least this weight of its own
    vocab_size: tl.tensor,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    LOWEST_KEY: tl.constexpr,
) -> tl.tensor:
    """The smallest key whose tokens are kept, as int64. The largest logit always is."""
    low = tl.full([], LOWEST_KEY, tl.int64)
    high = _order_key(highest).to(tl.int64)
    nth = tl.arange(0, PIVOTS).to(tl.int64)
    while low < high:
        step = tl.maximum(1, (high - low) // (PIVOTS + 1))
        pivots = tl.minimum(low + (nth + 1) * step - 1, high - 1)
        count = tl.full([BLOCK, PIVOTS], 0, tl.int32)
        weight = tl.full([BLOCK, PIVOTS], 0, tl.int64)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            # The padding's key is the lowest of all: above no pivot.
            above = _order_key(x).to(tl.int64)[:, None] > pivots[None, :]
            count += above.to(tl.int32)
            weight += tl.where(above, _weights(x, highest, temperature)[:, None], 0)
        keep = (tl.sum(count, axis=0) < max_count) & (tl.sum(weight, axis=0).to(tl.float64) < max_weight)
        keep &= _weight_of_key(pivots, highest, temperature).to(tl.float64) >= min_weight
        # What is kept at a key is kept above it, so the boundary lies above the last pivot not kept.
        high = tl.min(tl.where(keep, pivots, high), axis=0)
        low = tl.max(tl.where(keep, low, pivots + 1), axis=0)
    return high


@jit
def _sample_kernel(
    logits_ptr: tl.tensor,  # [B, vocab_size]
    temperature_ptr: tl.tensor,  # [B] float32
    top_k_ptr: tl.tensor,  # [B] int32
    top_p_ptr: tl.tensor,  # [B] float32
    min_p_ptr: tl.tensor,  # [B] float32
    seed_ptr: tl.tensor,  # [B] int64
    position_ptr: tl.tensor,  # [B] int64
    tokens_ptr: tl.tensor,  # [B] int64
    vocab_size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,  # power of two
    LOWEST_KEY: tl.constexpr,  # of -inf
) -> None:
    # Grid: (B,). One program draws one row.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row)

    # The largest logit and the first token that has it.
    highest = tl.full([], float("-inf"), tl.float32)
    greedy = tl.full([], 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        tile_highest = tl.max(x, axis=0)
        tile_first = tl.min(tl.where(x == tile_highest, token, vocab_size), axis=0)
        greedy = tl.where(tile_highest > highest, tile_first, greedy)
        highest = tl.maximum(highest, tile_highest)
    if temperature == 0.0:
        tl.store(tokens_ptr + row, greedy.to(tl.int64))
        return

    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    everything = tl.full([], float("inf"), tl.float64)
    nothing = tl.full([], 0.0, tl.float64)
    lowest_key = tl.full([], LOWEST_KEY, tl.int64)
    _, total = _above(row_ptr, lowest_key, highest, temperature, vocab_size, BLOCK)
    every_token = tl.full([], 0, tl.int64) + vocab_size
    if highest == float("-inf"):
        total = every_token << 32  # every token is the largest

    # The boundary of the kept set: the smallest kept key, and how many tokens of that key are kept.
    boundary = lowest_key
    num_at_boundary = every_token
    if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
        max_count = tl.where(top_k > 0, top_k, vocab_size)
        top_k_weight = total
        if (top_k > 0) & (top_p < 1.0):
            key = _smallest_kept(
                row_ptr, highest, temperature, max_count, everything, nothing, vocab_size, BLOCK, PIVOTS, LOWEST_KEY
            )
            count, weight = _above(row_ptr, key, highest, temperature, vocab_size, BLOCK)
            top_k_weight = weight + (max_count - count) * _weight_of_key(key, highest, temperature)
            top_k_weight = tl.minimum(top_k_weight, total)  # fewer tokens than top_k
        limit = top_p.to(tl.float64) * top_k_weight.to(tl.float64)
        floor = min_p.to(tl.float64) * 4294967296.0
        boundary = _smallest_kept(
            row_ptr, highest, temperature, max_count, limit, floor, vocab_size, BLOCK, PIVOTS, LOWEST_KEY
        )
        count, weight = _above(row_ptr, boundary, highest, temperature, vocab_size, BLOCK)
        at_boundary = _weight_of_key(boundary, highest, temperature)
        num_at_boundary = (max_count - count).to(tl.int64)
        if at_boundary > 0:
            # Of equal tokens the next is kept while the weight before it, an integer, is below the limit.
            room = tl.ceil(limit).to(tl.int64) - weight
            num_at_boundary = tl.minimum(num_at_boundary, tl.maximum(1, (room + at_boundary - 1) // at_boundary))

    # The draw: in vocabulary order, how many tokens have a cumulative kept weight of at most the threshold. Two passes,
    # as the kept weight must be known first.
    position = tl.load(position_ptr + row)
    low_word = (position & 0xFFFFFFFF).to(tl.uint32)
    high_word = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low_word)
    word, _, _, _ = tl.philox(tl.load(seed_ptr + row), low_word, high_word, zero, zero)
    uniform = word.to(tl.int64) >> 1
    threshold = tl.full([], -1, tl.int64)
    kept_total = tl.full([], 0, tl.int64)
    num_before = tl.full([], 0, tl.int64)
    for phase in tl.static_range(2):
        cumulative = tl.full([], 0, tl.int64)
        num_equal = tl.full([], 0, tl.int64)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            key = _order_key(x).to(tl.int64)
            equal = ((key == boundary) & (token < vocab_size)).to(tl.int64)
            rank = num_equal + tl.cumsum(equal, axis=0)  # from 1
            kept = (token < vocab_size) & ((key > boundary) | ((key == boundary) & (rank <= num_at_boundary)))
            weight = tl.where(kept, _weights(x, highest, temperature), 0)
            if phase == 1:
                up_to = cumulative + tl.cumsum(weight, axis=0)
                num_before += tl.sum(((up_to <= threshold) & (token < vocab_size)).to(tl.int64), axis=0)
            cumulative += tl.sum(weight, axis=0)
            num_equal += tl.sum(equal, axis=0)
        if phase == 0:
            kept_total = cumulative
            threshold = uniform * (kept_total >> 31) + ((uniform * (kept_total & 0x7FFFFFFF)) >> 31)
    tl.store(tokens_ptr + row, tl.minimum(num_before, every_token - 1))  # a row of NaN must not name a token beyond


def sample_triton(logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """``sampling.sample`` on the GPU."""
    batch, vocab_size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch > 0:
        _sample_kernel[(batch,)](
            logits,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            params.position,
            tokens,
            vocab_size,
            logits.stride(0),
            BLOCK=min(_MAX_BLOCK, next_power_of_2(vocab_size)),
            PIVOTS=_PIVOTS,
            LOWEST_KEY=_LOWEST_KEY,
            num_warps=8,
        )
    return tokens
