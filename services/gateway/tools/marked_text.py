"""Text in which a marker begins something else."""

from __future__ import annotations

from typing import NamedTuple


class Found(NamedTuple):
    """The text before a marker, the white space between both, and what follows the marker; without one, ``text`` alone."""

    text: str
    space: str = ""
    behind: str | None = None


class MarkedText:
    """Gives text out as soon as it cannot be part of a marker, nor white space before one."""

    def __init__(self, marker: str | None) -> None:
        self._marker = marker
        self._held = ""

    def feed(self, text: str) -> Found:
        if self._marker is None:
            return Found(text)
        text, self._held = self._held + text, ""
        before, found, behind = text.partition(self._marker)
        if found:
            kept = before.rstrip()
            return Found(kept, before[len(kept) :], behind)
        end = len(text) - partial_length(text, self._marker)
        end = len(text[:end].rstrip())
        self._held = text[end:]
        return Found(text[:end])

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def partial_length(text: str, marker: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``marker``."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
