"""A link between workers, as figures: how fast it is, and when bytes that are sent over it arrive. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What is imitated: what a worker can receive in all, and how long a byte is under way."""

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or self.latency_s < 0:
            raise ValueError(f"a link of {self.bytes_per_s:g} bytes/s with a latency of {self.latency_s:g} s")


class ShapedLink:
    """Says when bytes are there that were sent one after the other over such a link. Pure: ``now`` is passed in."""

    def __init__(self, shape: LinkShape) -> None:
        self.shape = shape
        self._free_s = float("-inf")

    def arrival_s(self, num_bytes: int, now: float) -> float:
        """When the last of ``num_bytes`` arrives, which are ready to be sent at ``now``."""
        self._free_s = max(now, self._free_s) + num_bytes / self.shape.bytes_per_s
        return self._free_s + self.shape.latency_s
