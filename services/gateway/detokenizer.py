"""Token ids to text, one token at a time.

The text of a generation is what its tokens add behind its prompt: a leading space stays where the prompt has text, and
a character whose bytes are split over tokens, or over prompt and output, comes out once, when it is complete. Joined,
the deltas are the decoding of all tokens.

One deviation from ``tokenizers``, on purpose: in a run of byte-fallback tokens that is not valid UTF-8 the library turns
every byte of the run into U+FFFD, also those of valid characters; here only the invalid ones are.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol, cast

from baton.services.gateway.token_pieces import Leading, TokenPieces

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """The text of one generation. ``last_piece`` holds the bytes that the token pushed last contributed."""

    last_piece: bytes
    prompt_text: str

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that is now complete, often one token's, sometimes none."""
        ...

    def push_each(self, token_ids: Sequence[int]) -> list[str]:
        """``push`` of one after another. What ``last_piece`` holds then is not said."""
        ...

    def flush(self) -> str:
        """What is still held back, at the end: an incomplete character is one U+FFFD."""
        ...


def create_detokenizer(
    pieces: TokenPieces,
    prompt_ids: Sequence[int],
    *,
    skip_special_tokens: bool = True,
    keep_prompt_text: bool = False,
    shown_ids: frozenset[int] = frozenset(),
) -> Detokenizer:
    """A detokeniser that continues ``prompt_ids``. ``prompt_text`` is empty unless ``keep_prompt_text``.

    ``shown_ids``: special tokens that are shown in any case.
    """
    kind = PieceDetokenizer if pieces.can_concatenate else WindowDetokenizer
    return kind(
        pieces,
        prompt_ids,
        skip_special_tokens=skip_special_tokens,
        keep_prompt_text=keep_prompt_text,
        shown_ids=shown_ids,
    )


class PieceDetokenizer:
    """For tokenizers whose text is a concatenation of pieces: one look-up and one UTF-8 decoder step per token."""

    def __init__(
        self,
        pieces: TokenPieces,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        keep_prompt_text: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._piece = pieces.piece
        self._hidden = pieces.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._leading = pieces.leading
        self._whole_texts = pieces.whole_texts
        self._at_start = True
        self._is_between_characters = False  # nothing that came before has a say in a token's text
        self._utf8 = _new_utf8_decoder("replace")
        self.last_piece = b""
        self.prompt_text = ""
        self._is_prompt_cut = False  # the prompt ends inside a character and its text is not shown
        if keep_prompt_text:
            self.prompt_text = "".join([self.push(token_id) for token_id in prompt_ids])
        else:
            self._skip(prompt_ids)

    def _skip(self, prompt_ids: Sequence[int]) -> None:
        """Takes over what matters of the prompt: whether it has text, and the bytes of a character that it cut."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id in self._hidden:
                continue
            piece = self._piece(token_id)
            if piece:
                self._at_start = False
            tail = piece + tail
            if len(tail) >= _MAX_CHARACTER_BYTES:
                break
        self._utf8.decode(tail)
        self._is_prompt_cut = bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        self._is_between_characters = False
        if token_id in self._hidden:
            self.last_piece = b""
            return ""
        piece = self._piece(token_id)
        if self._at_start and piece:
            self._at_start = False
            if self._leading is Leading.ONE_SPACE:
                piece = piece.removeprefix(b" ")
            elif self._leading is Leading.FIRST_TOKEN_SPACES:
                piece = piece.replace(b" ", b"")
        if self._is_prompt_cut and piece:
            self._is_prompt_cut = False
            if not 0x80 <= piece[0] <= 0xBF:
                self._utf8.reset()  # the output does not complete the prompt's character, so nothing of it is shown
        self.last_piece = piece
        return self._utf8.decode(piece)

    def push_each(self, token_ids: Sequence[int]) -> list[str]:
        if self._is_between_characters:
            texts = [self._whole_texts.get(token_id) for token_id in token_ids]
            if None not in texts:  # then all of them are ordinary, and what they leave behind is nothing
                return cast(list[str], texts)
        pushed = [self.push(token_id) for token_id in token_ids]
        self._is_between_characters = not (self._at_start or self._is_prompt_cut or self._utf8.getstate()[0])
        return pushed

    def flush(self) -> str:
        if self._is_prompt_cut:
            return ""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any other tokenizer: decodes a few tokens with and without the newest, and the difference is its text."""

    # Enough tokens before the new one for any decoder's joining rules.
    CONTEXT_TOKENS = 6
    # An undecodable tail is given up as U+FFFD after so many tokens; a character has at most four bytes.
    MAX_HELD_TOKENS = 8

    def __init__(
        self,
        pieces: TokenPieces,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        keep_prompt_text: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces = pieces
        self._hidden = pieces.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._shows_some = bool(shown_ids) or not skip_special_tokens
        self._window = list(prompt_ids[-self.CONTEXT_TOKENS :])
        self._read = len(self._window)
        self._shown = self._decode(self._window)
        self.prompt_text = self._decode(prompt_ids) if keep_prompt_text else ""
        self.last_piece = b""

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._shows_some:
            token_ids = [token_id for token_id in token_ids if token_id not in self._hidden]
        return self._pieces.decode(token_ids, skip_special_tokens=not self._shows_some)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        is_incomplete = text.endswith(_REPLACEMENT) and len(self._window) - self._read < self.MAX_HELD_TOKENS
        delta = "" if is_incomplete else self._take(text)
        self.last_piece = delta.encode()
        return delta

    def push_each(self, token_ids: Sequence[int]) -> list[str]:
        return [self.push(token_id) for token_id in token_ids]

    def _take(self, text: str) -> str:
        delta = text[len(self._shown) :]
        self._window = self._window[-self.CONTEXT_TOKENS :]
        self._read = len(self._window)
        self._shown = self._decode(self._window)
        return delta

    def flush(self) -> str:
        return self._take(self._decode(self._window)) if self._read < len(self._window) else ""
