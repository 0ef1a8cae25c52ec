"""Stop strings over a stream of text: nothing that is, or may become, a stop string gets out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    """What may be shown now, and the stop string that ended the text, if one did."""

    text: str
    matched: str | None = None


class StopChecker:
    """Finds the first stop string to be completed; of several that end at the same character the longest.

    So the outcome is a function of the text alone, however it was cut into pieces. Each piece costs time in proportion to
    its length and the number of stop strings, never to what is held back (Knuth, Morris, Pratt 1977).
    """

    def __init__(self, stop: Iterable[str], include_stop: bool = False) -> None:
        """``include_stop``: the stop string that matched is part of the text. Raises ValueError for an empty one."""
        self._patterns = [_Pattern(pattern) for pattern in dict.fromkeys(stop)]
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    def feed(self, text: str) -> StopResult:
        """The next piece. After a match, whatever follows is not part of the text any more."""
        if self._matched is not None:
            return StopResult("", self._matched)
        for index, character in enumerate(text):
            ended = [pattern.text for pattern in self._patterns if pattern.advance(character)]
            if ended:
                self._matched = max(ended, key=len)
                shown = self._held + text[: index + 1]
                self._held = ""
                return StopResult(shown if self._include_stop else shown[: -len(self._matched)], self._matched)
        shown = self._held + text
        num_shown = len(shown) - max((pattern.num_matched for pattern in self._patterns), default=0)
        self._held = shown[num_shown:]
        return StopResult(shown[:num_shown])

    def flush(self) -> str:
        """The text has ended by itself: what was held back is no stop string."""
        held, self._held = self._held, ""
        for pattern in self._patterns:
            pattern.num_matched = 0
        return held


class _Pattern:
    """One stop string and how much of it the text so far ends with."""

    __slots__ = ("_fallback", "num_matched", "text")

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("a stop string must not be empty")
        self.text = text
        self.num_matched = 0
        # _fallback[n]: the longest proper prefix of text that text[:n + 1] ends with.
        self._fallback = [0] * len(text)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._fallback[length - 1]
            length += text[index] == text[length]
            self._fallback[index] = length

    def advance(self, character: str) -> bool:
        """The text goes on with ``character``; True where that completes the stop string."""
        text, matched = self.text, self.num_matched
        while matched and text[matched] != character:
            matched = self._fallback[matched - 1]
        matched += text[matched] == character
        self.num_matched = matched
        return matched == len(text)
