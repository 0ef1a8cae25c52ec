"""Text that a model thinks before it answers, told from the answer as it comes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from baton.services.gateway.tools.marked_text import MarkedText


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands around a model's thoughts."""

    opening: str
    closing: str


KINDS = {"think": Markers("<think>", "</think>"), "mistral": Markers("[THINK]", "[/THINK]")}


def find_markers(asked: str, chat_template: str) -> Markers | None:
    """``asked``: a key of ``KINDS``, none, or auto: what the chat template gives away."""
    if asked != "auto":
        return KINDS.get(asked)
    return next((markers for markers in KINDS.values() if markers.closing in chat_template), None)


class ReasoningParser:
    """Thoughts stand at the beginning, between markers; ``is_open``: the prompt has begun them already.

    White space around thoughts belongs to nobody. However the text is cut, what comes out is the same.
    """

    def __init__(self, markers: Markers, *, is_open: bool) -> None:
        self._markers = markers
        self._inside: MarkedText | None = MarkedText(markers.closing) if is_open else None
        self._start: str | None = None if is_open else ""  # of a text that may begin with a marker
        self._strips_thought = True
        self._strips_answer = False
        self.num_chars = 0  # of the text that was read
        self.num_reasoning_chars = 0  # of those, the thoughts and their markers

    @property
    def is_inside(self) -> bool:
        """Thoughts are open."""
        return self._inside is not None

    @property
    def is_undecided(self) -> bool:
        """The text so far may be the beginning of a marker."""
        return self._start is not None

    @property
    def is_over(self) -> bool:
        """All that follows is the answer."""
        return self._start is None and self._inside is None

    def feed(self, text: str) -> tuple[str, str]:
        """What is new: thoughts and answer."""
        self.num_chars += len(text)
        if self._start is not None:
            self._start += text
            begun = self._start.lstrip()
            if begun.startswith(self._markers.opening):
                text = begun[len(self._markers.opening) :]
                self._start, self._inside = None, MarkedText(self._markers.closing)
            elif self._markers.opening.startswith(begun):
                return "", ""
            else:
                text, self._start = self._start, None
                return "", text
        if self._inside is None:
            return "", self._answer(text)
        found = self._inside.feed(text)
        thought = self._thought(found.text)
        if found.behind is None:
            return thought, ""
        self._inside, self._strips_answer = None, True
        self.num_reasoning_chars = self.num_chars - len(found.behind)
        return thought, self._answer(found.behind)

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the text."""
        if self._inside is not None:
            self.num_reasoning_chars = self.num_chars
            return self._thought(self._inside.flush().rstrip()), ""
        start, self._start = self._start, None
        return "", start or ""

    def _thought(self, text: str) -> str:
        if self._strips_thought:
            text = text.lstrip()
            self._strips_thought = not text
        return text

    def _answer(self, text: str) -> str:
        if self._strips_answer:
            text = text.lstrip()
            self._strips_answer = not text
        return text
