"""A model that only knows what was said so far: a tag a token instead of K and V, and the next token from the last tag."""

from __future__ import annotations

import zlib

VOCABULARY = 12
EOS = 0


def tags_of(token_ids: list[int], salt: str) -> list[int]:
    """One tag a token, each over all tokens up to it."""
    tag = zlib.crc32(salt.encode())
    tags = []
    for token in token_ids:
        tag = zlib.crc32(token.to_bytes(4, "little"), tag)
        tags.append(tag)
    return tags


def next_token(token_ids: list[int], salt: str) -> int:
    return tags_of(token_ids, salt)[-1] % VOCABULARY
