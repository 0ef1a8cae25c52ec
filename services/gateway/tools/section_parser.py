"""What the parsers of all formats share: text, and sections of it that hold calls.

A section is read character by character. What turns out to be no call is given back: it is read again as text, and may
hold the marker of another section. White space around sections belongs to neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar

from baton.services.gateway.tools.call_object import CallObject, Outcome
from baton.services.gateway.tools.calls import CallArguments, CallStart, Piece, Text, joined
from baton.services.gateway.tools.marked_text import MarkedText


class Step(Enum):
    """What a character of a section did."""

    MORE = "more"
    END = "end"  # it is the section's last
    BAD = "bad"  # it belongs to no section: neither does what was read since the last thing that was told


class SectionParser(ABC):
    """See ``CallParser``. ``names``: the tools that there are; a call of another one is text.

    ``marker`` begins a section; without one the whole text is a section, or none of it.
    """

    marker: ClassVar[str | None] = None

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.num_calls = 0
        self.call: CallObject | None = None
        self._pieces: list[Piece] = []
        self._text = MarkedText(self.marker)
        self._is_in_section = self.marker is None
        self._space = ""  # between the text and the marker
        self._read: list[str] = []  # of the section, since the last thing that was told
        self._has_told = False  # of this section
        self._strips_space = False

    @abstractmethod
    def begin(self) -> None:
        """A section begins."""

    @abstractmethod
    def read(self, char: str) -> Step:
        """Takes a section's next character, tells what is certain."""

    def feed(self, text: str) -> list[Piece]:
        rest = text
        while rest:
            rest = self._read_section(rest) if self._is_in_section else self._read_text(rest)
        return self._told()

    def finish(self) -> list[Piece]:
        while self._is_in_section:
            rest = self._leave()
            while rest:
                rest = self._read_section(rest) if self._is_in_section else self._read_text(rest)
        held = self._text.flush()
        self._emit(held.rstrip() if self.num_calls else held)
        return self._told()

    # For the formats.

    def tell(self, *pieces: Piece) -> None:
        """This is certain: what was read so far is not given back any more."""
        self._pieces += pieces
        self._has_told = True
        self._read.clear()

    def tell_call(self, name: str, arguments: str) -> None:
        """A whole call."""
        self.tell(CallStart(self.num_calls, name), CallArguments(self.num_calls, arguments))
        self.num_calls += 1

    def read_call(self, char: str) -> Outcome:
        """Takes the next character of a call that is written as a JSON object."""
        if self.call is None:
            self.call = CallObject(self.num_calls, self.names)
        outcome = self.call.feed(char)
        if self.call.is_started:
            self.tell(*self.call.take())
        if outcome is not Outcome.MORE:
            self.num_calls += self.call.is_started
            self.call = None
        return outcome

    # Text and sections.

    def _told(self) -> list[Piece]:
        pieces, self._pieces = joined(self._pieces), []
        return pieces

    def _emit(self, text: str) -> None:
        if self._strips_space:
            text = text.lstrip()
        if text:
            self._strips_space = False
            self._pieces.append(Text(text))

    def _read_text(self, text: str) -> str:
        found = self._text.feed(text)
        self._emit(found.text)
        if found.behind is None:
            return ""
        self._is_in_section, self._has_told, self._space = True, False, found.space
        self._read.clear()
        self.begin()
        return found.behind

    def _read_section(self, text: str) -> str:
        for position, char in enumerate(text):
            self._read.append(char)
            step = self.read(char)
            if step is Step.END:
                self._is_in_section, self._strips_space = False, True
                return text[position + 1 :]
            if step is Step.BAD:
                return self._leave(char) + text[position + 1 :]
        return ""

    def _leave(self, char: str = "") -> str:
        """Gives up the section; returns what is to be read again."""
        rest = "".join(self._read) or char  # a character that ended a call was told of with it
        if self.call is not None:
            self.num_calls += self.call.is_started
            self.call = None
        self._is_in_section = False
        self._read.clear()
        if self._has_told:
            self._strips_space = True
        else:
            self._emit(self._space + (self.marker or ""))
        return rest
