"""Names of KV blocks: a keyed hash chained over model, salt, the block before, and the block's tokens.

    root    = H(block size | fingerprint | salt)
    name[0] = H(root      | tokens of block 0)
    name[i] = H(name[i-1] | tokens of block i)

H is BLAKE2b (RFC 7693) with the cluster's key and a 16 byte digest. A name stands for a block's whole prefix, so equal
names mean equal K and V wherever they were computed, and whoever lacks the key can neither guess names nor craft two
prompts with the same one. The salt carries the tenant: caches of different salts share nothing.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

from baton.services.core.errors import ConfigurationError

NAME_BYTES = 16
_MAX_KEY_BYTES = 64  # BLAKE2b's own limit


class BlockNamer:
    """Names blocks under one key and one model. Immutable, so any number of threads may share it."""

    def __init__(self, key: bytes, fingerprint: str) -> None:
        """``key``: 1 to 64 secret bytes, the same in the whole cluster. ``fingerprint``: of the model that made the KV."""
        if not 1 <= len(key) <= _MAX_KEY_BYTES:
            raise ConfigurationError(f"the key of block names has {len(key)} bytes; it must have 1 to {_MAX_KEY_BYTES}")
        # Copying a keyed hash costs half of making one.
        self._hash = hashlib.blake2b(digest_size=NAME_BYTES, key=key)
        self._fingerprint = fingerprint.encode()

    def root(self, block_size: int, cache_salt: str) -> bytes:
        """The parent of the first block."""
        digest = self._hash.copy()
        # With its length in front, no fingerprint can run into the salt behind it.
        digest.update(block_size.to_bytes(4, "little") + len(self._fingerprint).to_bytes(4, "little"))
        digest.update(self._fingerprint + cache_salt.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def names(self, token_ids: Sequence[int], block_size: int, cache_salt: str = "") -> list[bytes]:
        """Names of all full blocks of ``token_ids``, then of the partial one, if there is one."""
        return self.extend(self.root(block_size, cache_salt), token_ids, block_size)

    def extend(self, parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """Names of the blocks of ``token_ids`` that follow the full block called ``parent``; the last may be partial.

        Raises OverflowError for token ids outside [0, 2**32).
        """
        data = _token_bytes(token_ids)
        copy = self._hash.copy
        step = block_size * 4
        names = []
        for start in range(0, len(data), step):
            digest = copy()
            digest.update(parent + data[start : start + step])
            parent = digest.digest()
            names.append(parent)
        return names


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    """Four little-endian bytes a token, on every machine."""
    tokens = array("I", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()
