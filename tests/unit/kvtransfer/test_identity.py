"""The digest over a manifest, put together for many blocks at once: the same bytes as block by block."""

from __future__ import annotations

import hashlib
import random

import pytest

from baton.kvtransfer.identity import manifest_digest, manifest_digest_of


def one_by_one(indices: list[int], names: list[bytes], checksums: list[int]) -> bytes:
    """As the wire has it: each block with its length before it."""
    digest = hashlib.blake2b(digest_size=16)
    for index, name, checksum in zip(indices, names, checksums, strict=True):
        entry = index.to_bytes(4, "little") + name + checksum.to_bytes(8, "little")
        digest.update(len(entry).to_bytes(4, "little") + entry)
    return digest.digest()


@pytest.mark.parametrize("num_blocks", [0, 1, 511, 512, 513, 1500])
@pytest.mark.parametrize("sizes", [(16,), (0, 3, 16)])
def test_a_manifest_has_one_digest_however_it_is_put_together(num_blocks: int, sizes: tuple[int, ...]) -> None:
    rng = random.Random(num_blocks)
    indices = sorted(rng.sample(range(2**32), num_blocks))
    names = [rng.randbytes(sizes[number % len(sizes)]) for number in range(num_blocks)]
    checksums = [rng.getrandbits(64) for _ in range(num_blocks)]
    expected = one_by_one(indices, names, checksums)
    assert manifest_digest_of(indices, names, checksums) == expected
    assert manifest_digest(zip(indices, names, checksums, strict=True)) == expected


def test_columns_of_different_lengths_have_no_digest() -> None:
    with pytest.raises(ValueError, match="2 indices, 1 names, 2 checksums"):
        manifest_digest_of([1, 2], [b"a" * 16], [3, 4])
