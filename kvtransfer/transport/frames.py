"""The data plane's frames: a header of 64 bytes, then a bounded body, then, for blocks sent inline, their bytes. Pure.

Header, little-endian:

    magic 4 | version u16 | kind u8 | 0 u8 | count u16 | 0 u16 | body bytes u32 | fence 16 | token 32

``fence`` is the digest of the handoff (key and both processes), or of the pair of processes in HELLO. ``token`` is the
handoff's transfer token, or the pair's data token in HELLO; zero in what the receiver sends. ``count`` entries make the body:

    BLOCKS, BLOCK_REFS   index u32 | block id u32 | generation u64 | checksum u64 | source row u32 | block bytes u32
    VERDICTS             index u32 | 1 landed, 0 corrupt u32
    GONE, CLOSE          code and reason, each u16 length and UTF-8 (count is 0)
    HELLO                nothing

``version`` is what the pair agreed on in the handshake, in every frame of both directions. Those of
version 1 have at most 64 entries.

Every length is checked against a fixed bound before anything is allocated for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import chain, compress, repeat
from typing import NamedTuple

from baton.kvtransfer.errors import RemoteProtocolError, TransferCode
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.versions import LARGE_FRAMES, WIRE_VERSIONS

MAGIC = b"BTKV"
MAX_ENTRIES = 512
"""Blocks in one frame. Enough that a frame's cost is spread over tiny ones; of larger ones fewer make a frame."""
_MAX_ENTRIES_OF_VERSION_1 = 64

_HEADER = struct.Struct("<4sHBBHHI16s32s")
_BLOCK = struct.Struct("<IIQQII")
_VERDICT = struct.Struct("<II")
_TEXT = struct.Struct("<HH")
_MAX_TEXT_BYTES = 1024  # a code and a reason

HEADER_BYTES = _HEADER.size
MAX_BODY_BYTES = max(MAX_ENTRIES * _BLOCK.size, _TEXT.size + 2 * _MAX_TEXT_BYTES)
NO_TOKEN = bytes(32)


class FrameKind(IntEnum):
    """What a frame is."""

    HELLO = 1  # sender: this is us; first frame of a connection
    BLOCKS = 2  # sender: blocks, their bytes follow
    BLOCK_REFS = 3  # sender: blocks that can be taken from our memory
    VERDICTS = 4  # receiver: what became of blocks
    GONE = 5  # receiver: that handoff is over, with a code and a reason
    CLOSE = 6  # receiver: this connection ends, with a code and a reason


_ENTRY_BYTES = {FrameKind.BLOCKS: _BLOCK.size, FrameKind.BLOCK_REFS: _BLOCK.size, FrameKind.VERDICTS: _VERDICT.size}


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose lengths are within their bounds."""

    kind: FrameKind
    count: int
    body_bytes: int
    fence: bytes
    token: bytes
    version: int = WIRE_VERSIONS.newest


class BlockEntry(NamedTuple):
    """One block of a BLOCKS or BLOCK_REFS frame."""

    slot: Slot
    checksum: int
    source_row: int  # row of the sender's memory; 0 where the bytes follow inline


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one frame, column by column: handled one by one, tiny blocks would cost more than their copy."""

    indices: tuple[int, ...]
    block_ids: tuple[int, ...]
    generations: tuple[int, ...]
    checksums: tuple[int, ...]
    source_rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def slots(self) -> tuple[Slot, ...]:
        """Where they are to go."""
        # What NamedTuple's own constructors do, without their call for each.
        columns = zip(self.indices, self.block_ids, self.generations, strict=True)
        return tuple(map(tuple.__new__, repeat(Slot), columns))

    def only(self, indices: set[int]) -> Blocks:
        """Those of these indices."""
        if len(indices) == len(self.indices):
            return self
        chosen = [index in indices for index in self.indices]
        columns = (self.indices, self.block_ids, self.generations, self.checksums, self.source_rows)
        return Blocks(*(tuple(compress(column, chosen)) for column in columns))


def max_entries(version: int) -> int:
    """Blocks, or verdicts, that one frame may have between two that speak this version."""
    return MAX_ENTRIES if version >= LARGE_FRAMES else _MAX_ENTRIES_OF_VERSION_1


def pack_hello(fence: bytes, token: bytes, version: int = WIRE_VERSIONS.newest) -> bytes:
    """The first frame of a connection."""
    return _header(FrameKind.HELLO, 0, 0, fence, token, version)


def pack_blocks(
    kind: FrameKind,
    fence: bytes,
    token: bytes,
    entries: Iterable[tuple[Slot, int, int]],
    block_bytes: int,
    version: int = WIRE_VERSIONS.newest,
) -> bytes:
    """Header and entries, each like a BlockEntry; for BLOCKS the caller sends the blocks' bytes right after."""
    slots, checksums, source_rows = zip(*entries, strict=True)
    rows = zip(*zip(*slots, strict=True), checksums, source_rows, repeat(block_bytes, len(slots)), strict=True)
    body = _blocks(len(slots)).pack(*chain.from_iterable(rows))
    return _header(kind, len(slots), len(body), fence, token, version) + body


@cache
def _blocks(count: int) -> struct.Struct:
    """So many blocks after each other."""
    return struct.Struct("<" + _BLOCK.format.removeprefix("<") * count)


def pack_verdicts(
    fence: bytes, landed: Iterable[int], corrupt: Iterable[int], version: int = WIRE_VERSIONS.newest
) -> bytes:
    """As many frames as it takes, one after the other."""
    most = max_entries(version)
    pack = _VERDICT.pack
    verdicts = [pack(index, 1) for index in landed] + [pack(index, 0) for index in corrupt]
    frames = []
    for start in range(0, len(verdicts), most):
        part = verdicts[start : start + most]
        frames += [_header(FrameKind.VERDICTS, len(part), len(part) * _VERDICT.size, fence, NO_TOKEN, version), *part]
    return b"".join(frames)


def pack_text(kind: FrameKind, fence: bytes, code: str, reason: str, version: int = WIRE_VERSIONS.newest) -> bytes:
    """GONE or CLOSE."""
    first, second = code.encode()[:_MAX_TEXT_BYTES], reason.encode()[:_MAX_TEXT_BYTES]
    body = _TEXT.pack(len(first), len(second)) + first + second
    return _header(kind, 0, len(body), fence, NO_TOKEN, version) + body


def _header(kind: FrameKind, count: int, body_bytes: int, fence: bytes, token: bytes, version: int) -> bytes:
    return _HEADER.pack(MAGIC, version, kind, 0, count, 0, body_bytes, fence, token)


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Reads HEADER_BYTES bytes. Raises RemoteProtocolError for what no peer sends in any version that we speak."""
    magic, version, kind_number, zero, count, zeros, body_bytes, fence, token = _HEADER.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"frame magic {magic!r}, expected {MAGIC!r}")
    if version not in WIRE_VERSIONS:
        raise RemoteProtocolError(f"frame version {version}; versions {WIRE_VERSIONS} are spoken here")
    try:
        kind = FrameKind(kind_number)
    except ValueError:
        raise RemoteProtocolError(f"frame kind {kind_number}") from None
    if zero or zeros:
        raise RemoteProtocolError("reserved bytes of a frame are not zero")
    entry_bytes = _ENTRY_BYTES.get(kind)
    if entry_bytes is not None:
        if not 1 <= count <= max_entries(version) or body_bytes != count * entry_bytes:
            raise RemoteProtocolError(f"{kind.name} frame with {count} entries in {body_bytes} bytes")
    elif count or (body_bytes if kind is FrameKind.HELLO else not _TEXT.size <= body_bytes <= MAX_BODY_BYTES):
        raise RemoteProtocolError(f"{kind.name} frame with {count} entries and {body_bytes} bytes")
    return Header(kind, count, body_bytes, fence, token, version)


def parse_blocks(body: bytes | bytearray | memoryview, block_bytes: int) -> Blocks:
    """Reads the entries of BLOCKS or BLOCK_REFS. Raises RemoteProtocolError where a block has another size than ours."""
    *columns, sizes = zip(*_BLOCK.iter_unpack(body), strict=True)
    blocks = Blocks(*columns)
    if sizes.count(block_bytes) != len(sizes):
        index, size = next(pair for pair in zip(blocks.indices, sizes, strict=True) if pair[1] != block_bytes)
        raise RemoteProtocolError(f"block {index} has {size} bytes there, {block_bytes} here")
    return blocks


def parse_verdicts(body: bytes | bytearray | memoryview) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reads the entries of VERDICTS: indices that landed, indices that were corrupt."""
    indices, verdicts = zip(*_VERDICT.iter_unpack(body), strict=True)
    num_landed, num_corrupt = verdicts.count(1), verdicts.count(0)
    if num_landed + num_corrupt != len(verdicts):
        raise RemoteProtocolError("a verdict that is neither 0 nor 1")
    if not num_corrupt:
        return indices, ()
    entries = list(zip(indices, verdicts, strict=True))
    return tuple([index for index, verdict in entries if verdict]), tuple(
        [index for index, verdict in entries if not verdict]
    )


def parse_text(body: bytes | bytearray | memoryview) -> tuple[TransferCode, str]:
    """Reads the body of GONE or CLOSE. A code that this version does not know becomes ABORTED."""
    code_bytes, reason_bytes = _TEXT.unpack_from(body)
    text = bytes(body[_TEXT.size :])
    if len(text) != code_bytes + reason_bytes:
        raise RemoteProtocolError(f"a text of {len(text)} bytes with lengths {code_bytes} and {reason_bytes}")
    code, reason = text[:code_bytes].decode(errors="replace"), text[code_bytes:].decode(errors="replace")
    return (TransferCode(code), reason) if code in set(TransferCode) else (TransferCode.ABORTED, f"{code}: {reason}")
