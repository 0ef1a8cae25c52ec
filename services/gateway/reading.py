"""What a chat choice says: thoughts, content and calls of tools, told apart as its text comes."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass, field

from baton.services.core.request import FinishReason
from baton.services.gateway.choice import ChoicePiece, OutputToken
from baton.services.gateway.parts import CallBegin, Part, Thought
from baton.services.gateway.reasoning import Markers, ReasoningParser
from baton.services.gateway.tools.calls import CallParser, CallStart, Piece, Text
from baton.services.gateway.tools.offer import ToolOffer
from baton.services.gateway.tools.registry import ToolFormat

TOOL_CALLS = "tool_calls"
_ID_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Reading:
    """How a request's choices are to be read."""

    markers: Markers | None = None
    tools: ToolOffer | None = None
    tool_format: ToolFormat | None = None

    @property
    def is_plain(self) -> bool:
        """Content is all there is."""
        return self.markers is None and self.tools is None

    @property
    def shown(self) -> tuple[str, ...]:
        """Special tokens that stand in the text all the same."""
        thoughts = () if self.markers is None else (self.markers.opening, self.markers.closing)
        calls = () if self.tools is None or self.tool_format is None else self.tool_format.markers
        return (*thoughts, *calls)

    def reader(self, *, is_open: bool) -> ChoiceReader:
        """For one choice. ``is_open``: its prompt ends inside of thoughts."""
        thoughts = None if self.markers is None else ReasoningParser(self.markers, is_open=is_open)
        if self.tools is None or self.tool_format is None:
            return ChoiceReader(thoughts, None)
        calls = self.tool_format.parser(self.tools.names)
        return ChoiceReader(thoughts, calls, self.tools.max_calls, has_short_ids=self.tool_format.has_short_ids)


@dataclass(slots=True)
class ChoiceReader:
    """Feed it the pieces of one choice, in order. What follows the last call that is allowed is dropped."""

    thoughts: ReasoningParser | None
    calls: CallParser | None
    max_calls: int | None = None
    has_short_ids: bool = False
    num_calls: int = 0
    num_reasoning_tokens: int = 0
    _waiting: list[OutputToken] = field(default_factory=list)  # whose side is not known

    def feed(self, piece: ChoicePiece) -> ChoicePiece:
        """The piece with its parts, and with the finish reason that the client sees."""
        is_last = piece.finish_reason is not None
        thought, answer = self._divide(piece, is_last)
        parts: list[Part] = [Thought(thought)] if thought else []
        if self.calls is None:
            parts += [Text(answer)] if answer else []
        else:
            pieces = self.calls.feed(answer) + (self.calls.finish() if is_last else [])
            parts += [part for part in map(self._part, pieces) if part is not None]
        if self.num_calls and piece.finish_reason == FinishReason.STOP.value:
            piece = piece._replace(finish_reason=TOOL_CALLS)
        return piece._replace(parts=tuple(parts))

    def _divide(self, piece: ChoicePiece, is_last: bool) -> tuple[str, str]:
        parser = self.thoughts
        if parser is None:
            return "", piece.text
        thought, answer = parser.feed(piece.text)
        if is_last:
            more_thought, more_answer = parser.finish()
            thought, answer = thought + more_thought, answer + more_answer
        self._count(parser, piece.tokens, is_last)
        return thought, answer

    def _count(self, parser: ReasoningParser, tokens: tuple[OutputToken, ...], is_last: bool) -> None:
        """A token is a thought's if its text begins before the end of thoughts. Text may come later than its tokens."""
        if parser.is_over and not self._waiting:
            return
        self._waiting += tokens
        if parser.is_undecided and not is_last:
            return
        end = parser.num_chars if parser.is_inside else parser.num_reasoning_chars
        self.num_reasoning_tokens += sum(token.text_offset < end for token in self._waiting)
        unread = [] if parser.is_over or is_last else self._waiting
        self._waiting = [token for token in unread if token.text_offset >= end]

    def _part(self, piece: Piece) -> Part | None:
        if self.max_calls is not None and not isinstance(piece, Text) and piece.index >= self.max_calls:
            return None
        if isinstance(piece, CallStart):
            self.num_calls += 1
            return CallBegin(piece.index, self._new_id(), piece.name)
        return piece

    def _new_id(self) -> str:
        if self.has_short_ids:
            return "".join(secrets.choice(_ID_ALPHABET) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
