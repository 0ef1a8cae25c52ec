"""What work costs, in seconds: the terms that the router adds up. Coefficients are the workers' own measurements."""

from __future__ import annotations

from dataclasses import dataclass

# Until a worker has reported a measurement. Only the ratios matter for a choice, and its first requests replace them.
DEFAULT_PREFILL_S_PER_TOKEN = 200e-6
DEFAULT_DECODE_STEP_S = 10e-3


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
class WorkerCost:
    """Speed of one worker. ``prefill_floor_s`` is what even a one-token prompt takes: one step."""

    prefill_s_per_token: float = DEFAULT_PREFILL_S_PER_TOKEN
    decode_step_s: float = DEFAULT_DECODE_STEP_S
    prefill_floor_s: float = 1e-3

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds to compute ``num_tokens`` prompt tokens that no cache holds."""
        return max(self.prefill_floor_s, num_tokens * self.prefill_s_per_token)


def visible_transfer_s(link: LinkCost, num_bytes: int, num_bytes_last_chunk: int) -> float:
    """Part of a transfer that computing does not hide: every chunk but the last travels while the next one computes."""
    return link.transfer_s(min(num_bytes, num_bytes_last_chunk))
