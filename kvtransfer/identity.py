"""Who takes part in a handoff, and the digests that stand for them where bytes are few."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

_LENGTH_AND_INDEX = struct.Struct("<II")
_CHECKSUM = struct.Struct("<Q")


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
    # Both sides wait for this at the end of a handoff, so it is put together in one go: the length that ``_digest`` puts
    # before each part, then the part. Column by column, since there are thousands of blocks.
    indices, names, checksums = list(zip(*blocks, strict=True)) or [()] * 3
    heads = map(_LENGTH_AND_INDEX.pack, [12 + len(name) for name in names], indices)
    parts = zip(heads, names, map(_CHECKSUM.pack, checksums), strict=True)
    return hashlib.blake2b(b"".join(chain.from_iterable(parts)), digest_size=16).digest()


def _words(identity: WorkerIdentity) -> tuple[str, str]:
    return identity.worker_id, identity.incarnation


def _digest(parts: Iterable[bytes]) -> bytes:
    """Each part with its length before it, so that no two lists of parts give the same bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()
