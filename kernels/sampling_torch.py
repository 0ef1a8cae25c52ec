"""The torch path of sampling.py: row by row, so that a row's numbers stay in the cache, and without sorting whole rows.

Most of a vocabulary can be told to be dropped by looking at each token alone; what is left is sorted. Where much is left,
because the distribution is flat, the cut is first narrowed to one bucket of a histogram of the logits by magnitude.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from baton.kernels.philox import philox_u32

if TYPE_CHECKING:
    from baton.kernels.sampling import SamplingTensors

__all__ = ["UNIFORM_BITS", "WEIGHT_BITS", "sample_torch"]

WEIGHT_BITS = 32  # a weight is at most 2^32, and the sum of 2^20 of them exact in a float64
UNIFORM_BITS = 31  # the product with 31 bits of a sum stays inside 63 bits

# As many tokens are sorted about as fast as counted into buckets.
_MAX_SORTED = 4096
# A bucket is a sign, an exponent and four bits of mantissa of a float32.
_BUCKET_BITS = 13
_NUM_BUCKETS = 1 << _BUCKET_BITS


def sample_torch(logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """``sampling.sample`` in torch."""
    temperatures = params.temperature.tolist()
    if not any(temperatures):
        return logits.argmax(dim=-1)
    words = philox_u32(params.seed, params.position).tolist()
    filters = zip(params.top_k.tolist(), params.top_p.tolist(), params.min_p.tolist(), strict=True)
    tokens = []
    for b, (top_k, top_p, min_p) in enumerate(filters):
        row = logits[b].float().contiguous()
        highest = row.max()
        if temperatures[b] == 0 or highest.isnan():  # a model that overflowed gets some token
            tokens.append(int(row.argmax()))
        else:
            weights = _weights(row, highest, params.temperature[b])
            tokens.append(_draw(row, weights, top_k, top_p, min_p, words[b]))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _weights(row: torch.Tensor, highest: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    distance = (row - highest).div_(temperature)
    if highest.isinf():  # the largest logit's own distance is 0, and not inf - inf
        distance.masked_fill_(row == highest, 0)
    return distance.exp_().mul_(2.0**WEIGHT_BITS).long()


def _draw(row: torch.Tensor, weights: torch.Tensor, top_k: int, top_p: float, min_p: float, word: int) -> int:
    kept = None
    if 0 < top_k < len(row):
        kept = _top_k(row, weights, top_k, top_p)
    elif top_p < 1:
        kept = _top_p(row, weights, top_p)
    if kept is not None:
        kept = kept.sort().values
        weights = weights[kept]
    if min_p > 0:
        weights = weights.masked_fill(weights < math.ceil(min_p * 2.0**WEIGHT_BITS), 0)
    cumulative = weights.cumsum(0)
    threshold = (word >> (32 - UNIFORM_BITS)) * int(cumulative[-1]) >> UNIFORM_BITS
    drawn = int(torch.searchsorted(cumulative, threshold, right=True))
    return drawn if kept is None else int(kept[drawn])


def _top_k(row: torch.Tensor, weights: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The tokens that top-k keeps, and of them those that top-p keeps."""
    smallest = row.topk(top_k).values[-1]
    candidates = (row >= smallest).nonzero().flatten()  # more than top_k where several equal the smallest
    kept = _descending(row, candidates)[:top_k]
    if top_p < 1:
        through = weights[kept].cumsum(0)
        kept = kept[: _num_kept(through, _limit(top_p, int(through[-1])))]
    return kept


def _top_p(row: torch.Tensor, weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The tokens that top-p keeps."""
    total = int(weights.sum())
    limit = _limit(top_p, total)
    # All tokens lighter than this together weigh less than what top-p drops. Half of it, against rounding.
    lightest = int((1 - top_p) * total / (2 * len(row)))
    heavy = weights > lightest
    if int(heavy.sum()) <= _MAX_SORTED:
        kept = _descending(row, heavy.nonzero().flatten())
        return kept[: _num_kept(weights[kept].cumsum(0), limit)]

    bits = (row + 0.0).view(torch.int32)  # one zero: the bits of -0.0 would count as smaller
    in_order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    bucket = (_NUM_BUCKETS // 2 - 1) - (in_order >> (32 - _BUCKET_BITS))  # the largest logits in the lowest bucket
    sums = torch.bincount(bucket, weights.double(), minlength=_NUM_BUCKETS).long().cumsum(0)
    cut = int(torch.searchsorted(sums, limit))  # the limit is reached in this bucket
    before = int(sums[cut - 1]) if cut > 0 else 0
    whole = (bucket < cut).nonzero().flatten()
    members = _descending(row, (bucket == cut).nonzero().flatten())
    num_members = _num_kept(weights[members].cumsum(0), limit - before)
    return torch.cat((whole, members[:num_members]))


def _descending(row: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens in the order of their logits, largest first; of equal ones, which come in ascending order, the lowest."""
    return tokens[row[tokens].sort(descending=True, stable=True).indices]


def _limit(top_p: float, total: int) -> int:
    """The weight from which on nothing is kept: a weight before a token, an integer, is below the product or not."""
    return max(1, math.ceil(top_p * total))


def _num_kept(through: torch.Tensor, limit: int) -> int:
    """How many tokens have less than ``limit`` before them, given the sums of weights through each token."""
    return 1 + int(torch.searchsorted(through, limit))
