"""The frame codec by itself."""

from __future__ import annotations

import random
import struct

import pytest

from baton.kvtransfer.errors import RemoteProtocolError, TransferCode
from baton.kvtransfer.messages import Slot
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.frames import BlockEntry, FrameKind

FENCE, TOKEN = bytes(range(16)), bytes(range(32))
ENTRIES = [BlockEntry(Slot(0, 7, 1), 2**64 - 1, 3), BlockEntry(Slot(5, 2**32 - 1, 2**64 - 1), 0, 0)]


def split(frame: bytes) -> tuple[frames.Header, bytes]:
    header = frames.parse_header(frame[: frames.HEADER_BYTES])
    body = frame[frames.HEADER_BYTES :]
    assert len(body) == header.body_bytes
    return header, body


@pytest.mark.parametrize("kind", [FrameKind.BLOCKS, FrameKind.BLOCK_REFS])
def test_blocks_round_trip(kind: FrameKind) -> None:
    header, body = split(frames.pack_blocks(kind, FENCE, TOKEN, ENTRIES, 4096))
    assert header == frames.Header(kind, 2, 64, FENCE, TOKEN)
    blocks = frames.parse_blocks(body, 4096)
    assert list(zip(blocks.slots(), blocks.checksums, blocks.source_rows, strict=True)) == ENTRIES
    assert all(isinstance(slot, Slot) for slot in blocks.slots())


def test_a_choice_of_blocks_keeps_what_belongs_to_each() -> None:
    _, body = split(frames.pack_blocks(FrameKind.BLOCKS, FENCE, TOKEN, ENTRIES, 4096))
    blocks = frames.parse_blocks(body, 4096)
    assert len(blocks.only(set())) == 0
    assert blocks.only({0, 5}) == blocks
    chosen = blocks.only({5})
    assert [*zip(chosen.slots(), chosen.checksums, chosen.source_rows, strict=True)] == ENTRIES[1:]


def test_verdicts_round_trip_in_as_many_frames_as_it_takes() -> None:
    landed, corrupt = range(frames.MAX_ENTRIES), (2000, 2001)
    whole = frames.pack_verdicts(FENCE, landed, corrupt)
    parts = []
    while whole:
        header = frames.parse_header(whole[: frames.HEADER_BYTES])
        end = frames.HEADER_BYTES + header.body_bytes
        parts.append(frames.parse_verdicts(whole[frames.HEADER_BYTES : end]))
        whole = whole[end:]
    assert parts == [(tuple(landed), ()), ((), corrupt)]
    mixed = frames.pack_verdicts(FENCE, (3, 1), (2,))
    assert frames.parse_verdicts(split(mixed)[1]) == ((3, 1), (2,))


@pytest.mark.parametrize("reason", ["", "two values: 1 and 2", "ünï©ode", "x" * 5000])
def test_texts_round_trip_and_are_cut_to_a_bound(reason: str) -> None:
    header, body = split(frames.pack_text(FrameKind.GONE, FENCE, TransferCode.EXPIRED, reason))
    assert header.body_bytes <= frames.MAX_BODY_BYTES
    assert frames.parse_text(body) == (TransferCode.EXPIRED, reason[:1024])


def test_a_code_of_a_newer_version_is_an_abort() -> None:
    _, body = split(frames.pack_text(FrameKind.GONE, FENCE, "brand_new", "why"))
    assert frames.parse_text(body) == (TransferCode.ABORTED, "brand_new: why")


def test_nothing_allowed_is_longer_than_64_kib_before_it_is_validated() -> None:
    assert frames.HEADER_BYTES + frames.MAX_BODY_BYTES <= 64 * 1024


GOOD = frames.pack_blocks(FrameKind.BLOCKS, FENCE, TOKEN, ENTRIES, 4096)
BAD_HEADERS = {
    "magic": (0, b"GET "),
    "version 0": (4, struct.pack("<H", 0)),
    "version 99": (4, struct.pack("<H", 99)),
    "kind 0": (6, b"\0"),
    "kind 200": (6, b"\xc8"),
    "reserved byte": (7, b"\1"),
    "no entries": (8, struct.pack("<H", 0)),
    "more entries than a frame may have": (8, struct.pack("<H", 65535)),
    "reserved word": (10, b"\1\0"),
    "body of 4 GiB": (12, struct.pack("<I", 2**32 - 1)),
    "body shorter than its entries": (12, struct.pack("<I", 63)),
    "body longer than its entries": (12, struct.pack("<I", 96)),
    "empty body": (12, struct.pack("<I", 0)),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused(name: str) -> None:
    offset, value = BAD_HEADERS[name]
    header = bytearray(GOOD[: frames.HEADER_BYTES])
    header[offset : offset + len(value)] = value
    with pytest.raises(RemoteProtocolError):
        frames.parse_header(header)


@pytest.mark.parametrize("kind", [FrameKind.HELLO, FrameKind.GONE, FrameKind.CLOSE])
@pytest.mark.parametrize(("count", "body_bytes"), [(1, 0), (0, 2**32 - 1), (1, 32), (0, frames.MAX_BODY_BYTES + 1)])
def test_frames_without_entries_have_none_and_a_bounded_body(kind: FrameKind, count: int, body_bytes: int) -> None:
    header = struct.pack("<4sHBBHHI16s32s", frames.MAGIC, 1, kind, 0, count, 0, body_bytes, FENCE, TOKEN)
    with pytest.raises(RemoteProtocolError):
        frames.parse_header(header)


def test_a_block_of_another_size_is_refused_with_both_sizes() -> None:
    _, body = split(frames.pack_blocks(FrameKind.BLOCKS, FENCE, TOKEN, ENTRIES, 4096))
    with pytest.raises(RemoteProtocolError, match="block 0 has 4096 bytes there, 8192 here"):
        frames.parse_blocks(body, 8192)


@pytest.mark.parametrize("lengths", [(0, 0), (9, 0), (65535, 65535)])
def test_a_text_whose_lengths_do_not_add_up_is_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.parse_text(struct.pack("<HH", *lengths) + b"12345678")


def test_random_headers_are_refused_or_within_every_bound() -> None:
    rng = random.Random(4)
    num_accepted = 0
    for _ in range(20_000):
        header = bytearray(GOOD[: frames.HEADER_BYTES])
        for _ in range(rng.randint(1, 4)):
            header[rng.randrange(16)] = rng.choice([0, 1, 2, 3, 4, 5, 6, 64, 65, 255, rng.randrange(256)])
        try:
            parsed = frames.parse_header(header)
        except RemoteProtocolError:
            continue
        num_accepted += 1
        assert parsed.body_bytes <= frames.MAX_BODY_BYTES
        assert parsed.count <= frames.MAX_ENTRIES
    assert num_accepted > 100
