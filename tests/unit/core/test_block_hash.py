"""Names of blocks."""

from __future__ import annotations

import hashlib
import sys
from array import array

import pytest

from baton.services.core.block_hash import NAME_BYTES, BlockNamer
from baton.services.core.errors import ConfigurationError

NAMER = BlockNamer(b"secret", "model-1")
TOKENS = list(range(100, 150))


def test_there_is_a_name_for_each_full_block_and_one_for_the_rest() -> None:
    names = NAMER.names(TOKENS, 16)
    assert [len(name) for name in names] == [NAME_BYTES] * 4
    assert names[:3] == NAMER.names(TOKENS[:48], 16)
    assert NAMER.names([], 16) == []


def test_a_name_is_a_keyed_hash_over_its_parent_and_little_endian_tokens() -> None:
    """Written out by hand, so that a change of the format, which would part old workers from new ones, is noticed."""
    parent = NAMER.root(16, "salt")
    for block in (TOKENS[:16], TOKENS[16:32]):
        data = b"".join(token.to_bytes(4, "little") for token in block)
        parent = hashlib.blake2b(parent + data, digest_size=16, key=b"secret").digest()
    assert NAMER.names(TOKENS[:32], 16, "salt")[1] == parent
    root = (16).to_bytes(4, "little") + (7).to_bytes(4, "little") + b"model-1" + b"salt"
    assert NAMER.root(16, "salt") == hashlib.blake2b(root, digest_size=16, key=b"secret").digest()


def test_extending_by_generated_tokens_gives_the_names_of_the_whole() -> None:
    names = NAMER.names(TOKENS, 16, "salt")
    assert names[:1] + NAMER.extend(names[0], TOKENS[16:], 16) == names


def test_one_changed_token_changes_its_block_and_all_behind_it() -> None:
    changed = [*TOKENS[:20], 7, *TOKENS[21:]]
    before, after = NAMER.names(TOKENS, 16), NAMER.names(changed, 16)
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after)


@pytest.mark.parametrize(
    "other",
    [
        BlockNamer(b"another", "model-1").names(TOKENS, 16, "a"),
        BlockNamer(b"secret", "model-2").names(TOKENS, 16, "a"),
        BlockNamer(b"secret", "model-1a").names(TOKENS, 16, ""),
        NAMER.names(TOKENS, 16, "b"),
        NAMER.names(TOKENS, 8, "a"),
    ],
    ids=["key", "model", "model runs into salt", "salt", "block size"],
)
def test_different_worlds_share_no_name(other: list[bytes]) -> None:
    assert not set(NAMER.names(TOKENS, 16, "a")) & set(other)


def test_a_partial_block_is_not_called_like_a_full_one_that_begins_with_it() -> None:
    assert NAMER.names(TOKENS[:10], 16) != NAMER.names(TOKENS[:16], 16)


def test_big_endian_machines_give_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = NAMER.names(TOKENS, 16)
    swapped = array("I", TOKENS)
    swapped.byteswap()
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    assert NAMER.names(swapped.tolist(), 16) == names


def test_a_lone_surrogate_in_the_salt_is_hashed_like_any_other_text() -> None:
    assert NAMER.root(16, "\ud800") != NAMER.root(16, "")


@pytest.mark.parametrize("key", [b"", b"x" * 65])
def test_keys_that_the_hash_cannot_take_are_refused(key: bytes) -> None:
    with pytest.raises(ConfigurationError, match=f"{len(key)} bytes"):
        BlockNamer(key, "model")


@pytest.mark.parametrize("token", [-1, 2**32])
def test_token_ids_outside_four_bytes_are_refused_instead_of_wrapped(token: int) -> None:
    with pytest.raises(OverflowError):
        NAMER.names([token], 16)
