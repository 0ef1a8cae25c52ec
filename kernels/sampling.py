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
from baton.kernels.philox import philox_u32_ref
from baton.kernels.sampling_kernel import sample_triton
from baton.kernels.sampling_torch import UNIFORM_BITS, WEIGHT_BITS, sample_torch

__all__ = ["SamplingTensors", "sample", "sample_ref"]


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """How to draw each row, all on the device of the logits and of length B."""

    temperature: torch.Tensor  # float32; 0: greedy
    top_k: torch.Tensor  # int32; 0: off
    top_p: torch.Tensor  # float32 in (0, 1]; 1: off
    min_p: torch.Tensor  # float32 in [0, 1); 0: off
    seed: torch.Tensor  # int64: the bit pattern of an unsigned 64-bit number
    position: torch.Tensor  # int64: the index of the token to be drawn in its sequence


def sample_ref(logits: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """The definition above, one row and one token after the other."""
    tokens = []
    for b in range(logits.shape[0]):
        row = logits[b].float()
        order = row.sort(descending=True, stable=True).indices.tolist()
        if params.temperature[b] == 0:
            tokens.append(order[0])
            continue
        highest = row[order[0]]
        distance = torch.where(row == highest, 0.0, (row - highest) / params.temperature[b])
        weights = (distance.exp() * 2.0**WEIGHT_BITS).long().tolist()
        top_k = int(params.top_k[b]) or len(order)
        limit = float(params.top_p[b]) * sum(weights[i] for i in order[:top_k])
        kept, total = [order[0]], weights[order[0]]
        for i in order[1:top_k]:
            if total >= limit or weights[i] < float(params.min_p[b]) * 2**WEIGHT_BITS:
                break
            kept.append(i)
            total += weights[i]
        word = philox_u32_ref(int(params.seed[b]), int(params.position[b]))[0]
        remaining = (word >> (32 - UNIFORM_BITS)) * total >> UNIFORM_BITS
        for i in sorted(kept):
            remaining -= weights[i]
            if remaining < 0:
                tokens.append(i)
                break
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def sample(
    logits: torch.Tensor,  # [B, V], any float dtype
    params: SamplingTensors,
) -> torch.Tensor:  # [B] int64
    """Draw one token per row. A row's draw depends on nothing but its own logits and parameters.

    Penalties, biases and masks are applied before: a masked token has a logit of -inf.
    """
    return select(logits.device, torch_path=sample_torch, triton_path=sample_triton, reference=sample_ref)(
        logits, params
    )
