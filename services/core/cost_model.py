"""What work costs, in seconds: the terms that the router adds up. Coefficients are the workers' own measurements."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

# Until a worker has reported a measurement. Only the ratios matter for a choice, and its first requests replace them.
DEFAULT_PREFILL_S_PER_TOKEN = 200e-6
DEFAULT_DECODE_STEP_S = 10e-3
_LEAST_GROWTH = 0.25


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Time to move bytes between two workers: ``fixed_s + num_bytes / bytes_per_s``."""

    fixed_s: float
    bytes_per_s: float

    def transfer_s(self, num_bytes: int) -> float:
        return self.fixed_s + num_bytes / self.bytes_per_s


# Conservative figures for a pair that has not been measured: one copy in memory, and a 10 Gbit/s network.
SAME_HOST = LinkCost(fixed_s=2e-3, bytes_per_s=4e9)
OTHER_HOST = LinkCost(fixed_s=4e-3, bytes_per_s=1.0e9)


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """A decode step: affine in the sequences of its batch and in the tokens that they attend to."""

    base_s: float
    per_sequence_s: float
    per_context_token_s: float = 0.0

    def step_s(self, batch: int, context_tokens: int = 0) -> float:
        return self.base_s + batch * self.per_sequence_s + context_tokens * self.per_context_token_s


@dataclass(frozen=True, slots=True)
class WorkerCost:
    """Speed of one worker. ``prefill_floor_s`` is what even a one-token prompt takes: one step.

    ``curve``: (tokens, seconds), both growing; between two points it is a line, beyond the last one it goes on like the last
    piece. Without one a prompt takes its tokens' time, but the floor at least. ``decode_step_s`` is a step as they went lately.
    ``curiosity``: the part of a prompt's time by which its price is lowered, because of what would be learned from it.
    ``gap_s``: what lies between the first two tokens of a request that is handed over to it; None: not known.
    """

    prefill_s_per_token: float = DEFAULT_PREFILL_S_PER_TOKEN
    decode_step_s: float = DEFAULT_DECODE_STEP_S
    prefill_floor_s: float = 1e-3
    curve: tuple[tuple[int, float], ...] = ()
    decode: DecodeCost | None = None
    curiosity: float = 0.0
    gap_s: float | None = None

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds to compute ``num_tokens`` prompt tokens that no cache holds."""
        if self.curve:
            return interpolate(self.curve, num_tokens)
        return max(self.prefill_floor_s, num_tokens * self.prefill_s_per_token)

    def step_s(self, batch: int) -> float:
        """Seconds of a decode step with so many sequences."""
        return self.decode_step_s if self.decode is None else self.decode.step_s(batch)

    def growth_s(self, batch: int, max_batch: int) -> float:
        """How much longer a step takes with so many sequences. Until that is known: in a full batch, twice as long.

        What was learned from a few noisy steps may say that a batch costs nothing. It does, so a quarter of that at least:
        or a worker whose link is quicker by a hair would get everything again.
        """
        unknown_s = self.decode_step_s * batch / max_batch
        return unknown_s if self.decode is None else max(self.decode.per_sequence_s * batch, _LEAST_GROWTH * unknown_s)


def interpolate(curve: Sequence[tuple[int, float]], x: float) -> float:
    """The value of a piecewise line; before its first point that point's."""
    at = bisect_left(curve, (x,))
    if at == 0:
        return curve[0][1]
    if at == len(curve):
        if at == 1:
            return curve[0][1] * x / curve[0][0]
        at -= 1
    (x0, y0), (x1, y1) = curve[at - 1], curve[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def visible_transfer_s(link: LinkCost, num_bytes: int, num_bytes_last_chunk: int) -> float:
    """Part of a transfer that computing does not hide: every chunk but the last travels while the next one computes."""
    return link.transfer_s(min(num_bytes, num_bytes_last_chunk))
