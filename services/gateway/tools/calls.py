"""What a parser of tool calls makes of a model's text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. Calls are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which joined are a JSON object."""

    index: int
    text: str


Piece: TypeAlias = Text | CallStart | CallArguments


class CallParser(Protocol):
    """Reads one choice. Pure: how its text is cut into pieces changes nothing but how the answer is cut."""

    def feed(self, text: str) -> list[Piece]:
        """What is certain now."""
        ...

    def finish(self) -> list[Piece]:
        """What is left at the end of the text."""
        ...


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind put together."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        match last, piece:
            case Text(), Text():
                result[-1] = Text(last.text + piece.text)
            case CallArguments(), CallArguments() if last.index == piece.index:
                result[-1] = CallArguments(last.index, last.text + piece.text)
            case _:
                result.append(piece)
    return [piece for piece in result if not isinstance(piece, Text | CallArguments) or piece.text]
