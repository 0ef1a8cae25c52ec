"""Drawing one token per row of logits: temperature, top-k, top-p, min-p, and one uniform number.

For a row l with temperature t > 0 each token gets an integer weight,

    w_i = floor(2^32 exp((l_i - max_j l_j) / t))

and tokens are ordered by (l_i descending, i ascending). The kept set is the longest prefix of that order in which

    its length is at most top_k,
    the weight before each token is below top_p * (the weight of the top_k tokens),
    w_i >= min_p * 2^32                                                        (never empty: the first token is kept)

With r = floor(u W / 2^31), where u is the upper 31 bits of Philox4x32-10(key=seed, counter=position) and W the kept
weight, the draw is the first kept token, in vocabulary order, whose cumulative weight exceeds r. With temperature 0 it is
the largest logit, the lowest index among equals.

Why integers: their sums do not depend on the order of addition. So the kept set and the draw are the same whatever the
batch, the number of threads or the tiling of a kernel: a continuation on another worker draws the same token. What
2^-32 of the most likely token's probability rounds away is far below what 16-bit logits resolve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from baton.kernels.launch import select
from baton.kernels.philox import philox_u32, philox_u32_ref
from baton.kernels.sampling_kernel import sample_triton

__all__ = ["SamplingTensors", "sample", "sample_ref"]

_WEIGHT_BITS = 32  # w <= 2^32, and a sum over 2^20 tokens stays far inside 63 bits
_UNIFORM_BITS = 31  # u * (31 bits of W) stays inside 63 bits
# Rows whose kept set lies within this many of the largest logits need no sort of the whole row.
_CANDIDATES = 1024


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """How to draw each row, all on the device of the logits and of length B."""

    temperature: torch.Tensor  # float32; 0: greedy
    top_k: torch.Tensor  # int32; 0: off
    top_p: torch.Tensor  # float32 in (0, 1]; 1: off
    min_p: torch.Tensor  # float32 in [0, 1); 0: off
    seed: torch.Tensor  # int64: the bit pattern of an unsigned 64-bit number
    position: torch.Tensor  # int64: the index of the token to be drawn in its sequence


def _weights(
    logits: torch.Tensor,  # [..., V] float32
    temperature: torch.Tensor,  # [..., 1] float32, positive
) -> torch.Tensor:  # [..., V] int64
    highest = logits.amax(dim=-1, keepdim=True)
    # The largest logit's own distance is 0 by definition: inf - inf, where a row has infinities, is not.
    distance = torch.where(logits == highest, 0.0, (logits - highest) / temperature)
    return (distance.exp() * 2.0**_WEIGHT_BITS).long()


def _threshold(uniform_u32: int, total: int) -> int:
    return (uniform_u32 >> (32 - _UNIFORM_BITS)) * total >> _UNIFORM_BITS


def sample_ref(logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """The definition above, one row and one token after the other."""
    tokens = []
    for b in range(logits.shape[0]):
        row = logits[b].float()
        order = row.sort(descending=True, stable=True).indices.tolist()
        if params.temperature[b] == 0:
            tokens.append(order[0])
            continue
        weights = _weights(row, params.temperature[b]).tolist()
        top_k = int(params.top_k[b]) or len(order)
        limit = float(params.top_p[b]) * sum(weights[i] for i in order[:top_k])
        kept, before = [order[0]], weights[order[0]]
        for i in order[1:top_k]:
            if before >= limit or weights[i] < float(params.min_p[b]) * 2**_WEIGHT_BITS:
                break
            kept.append(i)
            before += weights[i]
        word = philox_u32_ref(int(params.seed[b]), int(params.position[b]))[0]
        remaining = _threshold(word, before)
        for i in sorted(kept):
            remaining -= weights[i]
            if remaining < 0:
                tokens.append(i)
                break
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _mask_unkept(logits: torch.Tensor, weights: torch.Tensor, params: SamplingTensors) -> None:
    """Set the weights of all tokens that top-k, top-p or min-p drop to zero. Tensors hold the rows that filter."""
    vocab_size = logits.shape[1]
    top_k = torch.where(params.top_k > 0, params.top_k, vocab_size).clamp(max=vocab_size)
    num_candidates = vocab_size
    if vocab_size > 2 * _CANDIDATES:
        num_candidates = max(_CANDIDATES, int(torch.where(params.top_k > 0, top_k, 0).amax()))
        if num_candidates > vocab_size // 4:
            num_candidates = vocab_size
    values, kept = _kept_prefix(logits, weights, top_k, params, num_candidates)
    if num_candidates < vocab_size and bool((kept == num_candidates).logical_and(kept < top_k).any()):
        values, kept = _kept_prefix(logits, weights, top_k, params, vocab_size)
    last = values.gather(1, kept.unsqueeze(1) - 1)
    # Among tokens equal to the last kept one, only the lowest indices are kept.
    num_above = (values > last).sum(dim=1)
    weights.masked_fill_(logits < last, 0)
    num_equal = (logits == last).sum(dim=1)
    for b in (num_equal > kept - num_above).nonzero().flatten().tolist():
        equal = (logits[b] == last[b]).nonzero().flatten()
        weights[b, equal[int(kept[b] - num_above[b]) :]] = 0


def _kept_prefix(
    logits: torch.Tensor, weights: torch.Tensor, top_k: torch.Tensor, params: SamplingTensors, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``num_candidates`` largest logits of each row in descending order, and how many of them are kept.

    The latter is a lower bound where it equals ``num_candidates`` and ``top_k`` is larger.
    """
    if num_candidates < logits.shape[1]:
        values, indices = logits.topk(num_candidates, dim=1)
    else:
        values, indices = logits.sort(dim=1, descending=True)
    ordered = weights.gather(1, indices)
    cumulative = ordered.cumsum(dim=1)
    # Without top-k its weight is the whole row's; with it, top_k <= num_candidates.
    in_top_k = cumulative.gather(1, (top_k.long().clamp(max=num_candidates) - 1).unsqueeze(1))
    row_total = weights.sum(dim=1, keepdim=True)
    total = torch.where(params.top_k.unsqueeze(1) > 0, in_top_k, row_total)
    limit = params.top_p.double().unsqueeze(1) * total.double()
    floor = params.min_p.double().unsqueeze(1) * 2.0**_WEIGHT_BITS
    rank = torch.arange(num_candidates, device=logits.device)
    keep = (cumulative - ordered < limit) & (ordered >= floor) & (rank < top_k.unsqueeze(1))
    return values, keep.sum(dim=1).clamp(min=1)


def _sample_torch(logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    draws = params.temperature > 0
    if not bool(draws.any()):
        return logits.argmax(dim=-1)
    rows = None if bool(draws.all()) else draws.nonzero().flatten()
    if rows is None:
        return _draw(logits.float().contiguous(), params)
    tokens = logits.argmax(dim=-1)
    tokens[rows] = _draw(logits[rows].float(), _take(params, rows))
    return tokens


def _take(params: SamplingTensors, rows: torch.Tensor) -> SamplingTensors:
    return SamplingTensors(
        params.temperature[rows],
        params.top_k[rows],
        params.top_p[rows],
        params.min_p[rows],
        params.seed[rows],
        params.position[rows],
    )


def _draw(logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    weights = _weights(logits, params.temperature.unsqueeze(1))
    filters = ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)).nonzero().flatten()
    if len(filters) == len(logits):
        _mask_unkept(logits, weights, params)
    elif len(filters):
        filtered = weights[filters]
        _mask_unkept(logits[filters], filtered, _take(params, filters))
        weights[filters] = filtered
    cumulative = weights.cumsum_(dim=1)
    total = cumulative[:, -1]
    uniform = philox_u32(params.seed, params.position) >> (32 - _UNIFORM_BITS)
    high, low = total >> _UNIFORM_BITS, total & ((1 << _UNIFORM_BITS) - 1)
    threshold = uniform * high + (uniform * low >> _UNIFORM_BITS)
    tokens = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    return tokens.clamp_(max=logits.shape[1] - 1)  # a row of NaN must not name a token beyond the vocabulary


def sample(
    logits: torch.Tensor,  # [B, V], any float dtype
    params: SamplingTensors,
) -> torch.Tensor:  # [B] int64
    """Draw one token per row. A row's draw depends on nothing but its own logits and parameters.

    Penalties, biases and masks are applied before: a masked token has a logit of -inf.
    """
    return select(logits.device, torch_path=_sample_torch, triton_path=sample_triton, reference=sample_ref)(
        logits, params
    )
