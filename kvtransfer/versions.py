"""Versions of the wire: what a process speaks, what two of them speak together, and since when what is there. Pure.

A version stands for the messages of the control plane and the frames of the data plane together. Each side says in the
handshake from which to which it speaks; the pair speaks the newest that both do, on both planes, for as long as it lasts.
"""

from __future__ import annotations

from dataclasses import dataclass

TIMELY_ANSWERS = 2
"""Since this version a reservation is answered within the time that the sender names, if only with "still looking": a
receiver that does not answer is dead, not busy."""

LARGE_FRAMES = 2
"""Since this version a frame has up to 512 entries, before it 64: blocks of a few KiB cost less than their frames."""


@dataclass(frozen=True, slots=True)
class VersionRange:
    """All versions from ``oldest`` to ``newest``, both included."""

    oldest: int
    newest: int

    def __post_init__(self) -> None:
        if not 1 <= self.oldest <= self.newest:
            raise ValueError(f"wire versions from {self.oldest} to {self.newest}")

    def __contains__(self, version: int) -> bool:
        return self.oldest <= version <= self.newest

    def __str__(self) -> str:
        return str(self.oldest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def up_to(self, newest: int) -> VersionRange:
        """Without what is newer than ``newest``. Raises ValueError when nothing is left."""
        return VersionRange(self.oldest, min(self.newest, newest))


WIRE_VERSIONS = VersionRange(1, 2)
"""What this release speaks: the newest version and the one before it, so that a rolling upgrade never parts the workers."""


def common_version(one: VersionRange, other: VersionRange) -> int | None:
    """The newest version that both speak; None when there is none."""
    newest = min(one.newest, other.newest)
    return newest if newest in one and newest in other else None
