"""Who takes part in a handoff, and the digests that stand for them where bytes are few."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, repeat

_MAX_ENTRIES = 512  # of a manifest, put together by one call
_FIXED_BYTES = 12  # of an entry: index and checksum


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """A worker process. A restart keeps ``worker_id`` and changes ``incarnation``."""

    worker_id: str
    incarnation: str

    def __str__(self) -> str:
        return f"{self.worker_id}/{self.incarnation[:8]}"


@dataclass(frozen=True, slots=True)
class HandoffKey:
    """One try at handing one request over. ``attempt`` counts from 1."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


@dataclass(frozen=True)
class HandoffId:
    """The fence: a try and the two processes of it. On every message; one that differs in any part is refused."""

    key: HandoffKey
    sender: WorkerIdentity
    receiver: WorkerIdentity

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for all of it in the data plane's frames."""
        parts = (self.key.request_id, str(self.key.attempt), *_words(self.sender), *_words(self.receiver))
        return _digest(part.encode() for part in parts)

    def __str__(self) -> str:
        return f"{self.key} {self.sender}->{self.receiver}"


def pair_digest(sender: WorkerIdentity, receiver: WorkerIdentity) -> bytes:
    """16 bytes that stand for a pair of processes in the data plane's first frame."""
    return _digest(part.encode() for part in ("pair", *_words(sender), *_words(receiver)))


def manifest_digest(blocks: Iterable[tuple[int, bytes, int]]) -> bytes:
    """BLAKE2b-128 over (index, name, checksum) of the blocks that were sent, in index order."""
    indices, names, checksums = list(zip(*blocks, strict=True)) or [()] * 3
    return manifest_digest_of(indices, names, checksums)


def manifest_digest_of(indices: Sequence[int], names: Sequence[bytes], checksums: Sequence[int]) -> bytes:
    """The same, of columns of equal length."""
    # Both sides wait for this at the end of a handoff, and there are thousands of blocks: hundreds of them are put together
    # by one call, each with the length before it that ``_digest`` puts before a part.
    if not len(indices) == len(names) == len(checksums):
        raise ValueError(f"{len(indices)} indices, {len(names)} names, {len(checksums)} checksums")
    sizes = set(map(len, names))
    step = _MAX_ENTRIES if len(sizes) == 1 else 1
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(indices), step):
        part = slice(start, start + step)
        size = len(names[start])
        rows = zip(repeat(_FIXED_BYTES + size), indices[part], names[part], checksums[part], strict=False)
        digest.update(_entries(size, len(indices[part])).pack(*chain.from_iterable(rows)))
    return digest.digest()


@lru_cache(maxsize=64)
def _entries(name_bytes: int, count: int) -> struct.Struct:
    """So many entries of a manifest after each other: bytes that follow, index, name, checksum."""
    return struct.Struct("<" + f"II{name_bytes}sQ" * count)


def _words(identity: WorkerIdentity) -> tuple[str, str]:
    return identity.worker_id, identity.incarnation


def _digest(parts: Iterable[bytes]) -> bytes:
    """Each part with its length before it, so that no two lists of parts give the same bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()
