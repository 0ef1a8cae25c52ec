"""How long answers get, learned from those that ended: what admission promises room for."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# Two buckets a doubling, so an answer's length is known within a factor of sqrt(2): blocks are coarser than that.
_BOUNDS = sorted({round(2 ** (exponent / 2)) for exponent in range(43)})  # upper ends, in tokens; 1 to 2**21
_RESCALE_ABOVE = 1e12


class OutputLengthEstimator:
    """A histogram of output lengths in which what is older weighs less.

    A quantile rather than the mean: too little promised costs a preemption, which computes a whole context again; too
    much costs a wait.
    """

    def __init__(
        self, *, quantile: float = 0.8, prior_tokens: int = 256, prior_weight: float = 8.0, memory: float = 512.0
    ) -> None:
        """``prior_tokens`` counts like ``prior_weight`` answers before the first; weights fall to 1/e in ``memory`` answers."""
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"quantile is {quantile}; it must be in (0, 1)")
        if prior_tokens < 1 or prior_weight <= 0.0 or memory < 1.0:
            raise ValueError("prior_tokens and memory must be at least 1, prior_weight above 0")
        self._quantile = quantile
        # Instead of shrinking all old weights at each answer, the new one's grows.
        self._growth = 1.0 / (1.0 - 1.0 / (memory + 1.0))
        self._weight = 1.0
        self._weights = [0.0] * len(_BOUNDS)
        self._weights[_bucket(prior_tokens)] = prior_weight

    def observe(self, num_output_tokens: int) -> None:
        """An answer ended by itself, or at its limit, after so many tokens."""
        self._weight *= self._growth
        self._weights[_bucket(num_output_tokens)] += self._weight
        if self._weight > _RESCALE_ABOVE:
            self._weights = [weight / self._weight for weight in self._weights]
            self._weight = 1.0

    def expected(self, max_tokens: int, num_output_tokens: int = 0) -> int:
        """What the quantile of the answers longer than ``num_output_tokens`` does not exceed; at most ``max_tokens``."""
        first = bisect_left(_BOUNDS, num_output_tokens + 1)
        sums = list(accumulate(self._weights[first:]))
        if not sums or sums[-1] <= 0.0:
            # Longer than all that were seen: as much again, as for a heavy tail.
            return min(max_tokens, 2 * max(num_output_tokens, 1))
        at = bisect_left(sums, self._quantile * sums[-1])
        return min(max_tokens, max(_BOUNDS[first + min(at, len(sums) - 1)], num_output_tokens + 1))


def _bucket(num_tokens: int) -> int:
    return min(bisect_left(_BOUNDS, num_tokens), len(_BOUNDS) - 1)
