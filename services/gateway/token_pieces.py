"""What each token id contributes to the text, as bytes.

Byte-level and SentencePiece-style tokenizers decode by concatenating one piece per token, so text can be streamed by
looking pieces up, without calling the tokenizer. Which of them a tokenizer is, its decoder says (the ``decoder`` section
of tokenizer.json). Others have no such table and are decoded in windows (see detokenizer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import orjson

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Leading(Enum):
    """What a decoder removes from the front of the whole text."""

    NOTHING = "nothing"
    ONE_SPACE = "one_space"
    FIRST_TOKEN_SPACES = "first_token_spaces"


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token with characters of its own
        return token.encode()


def _replaced_piece(token: str, pattern: str, content: str) -> bytes:
    return token.replace(pattern, content).encode()


def _byte_fallback_piece(token: str, pattern: str, content: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else _replaced_piece(token, pattern, content)


@dataclass(frozen=True, slots=True)
class _Rule:
    to_piece: Callable[[str], bytes]
    leading: Leading = Leading.NOTHING


class TokenPieces:
    """Pieces and names of a tokenizer's tokens; shared by all requests. ``backend`` is a ``tokenizers.Tokenizer``."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._rule = _rule_of(backend)
        self._cache: dict[int, bytes] = {}
        # Of ordinary tokens that were seen: the text, where the piece is whole characters. No special token is among them.
        self.whole_texts: dict[int, str] = {}
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @property
    def can_concatenate(self) -> bool:
        """Whether text is the concatenation of ``piece(token)``. If not, only ``decode`` gives text."""
        return self._rule is not None

    @property
    def leading(self) -> Leading:
        return Leading.NOTHING if self._rule is None else self._rule.leading

    def piece(self, token_id: int) -> bytes:
        """Bytes that the token adds to the text; none for an id that the vocabulary does not have."""
        piece = self._cache.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id)
            if token is None:
                piece = b""
            else:
                piece = token.encode() if self._rule is None else self._rule.to_piece(token)
            self._cache[token_id] = piece
            if token_id not in self.special_ids and (text := _whole_text(piece)) is not None:
                self.whole_texts[token_id] = text
        return piece

    def name(self, token_id: int) -> str:
        """The token as text for people; an incomplete character is U+FFFD."""
        return self.piece(token_id).decode(errors="replace")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _rule_of(backend: Any) -> _Rule | None:
    if backend.decoder is None:
        return None
    decoder = orjson.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    match kinds:
        case ["ByteLevel"]:
            return _Rule(_byte_level_piece)
        case ["Metaspace"]:
            leading = Leading.NOTHING if steps[0]["prepend_scheme"] == "never" else Leading.FIRST_TOKEN_SPACES
            return _Rule(partial(_replaced_piece, pattern=steps[0]["replacement"], content=" "), leading)
        case ["Replace", "ByteFallback", "Fuse"] if "String" in steps[0]["pattern"]:
            leading = Leading.NOTHING
        case ["Replace", "ByteFallback", "Fuse", "Strip"] if "String" in steps[0]["pattern"]:
            strip = steps[3]
            if (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0):
                return None
            leading = Leading.ONE_SPACE
        case _:
            return None
    pattern, content = steps[0]["pattern"]["String"], steps[0]["content"]
    return _Rule(partial(_byte_fallback_piece, pattern=pattern, content=content), leading)
