"""Cuts what comes over a link into the pieces that its protocol is made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from baton.kvtransfer.errors import RemoteProtocolError
from baton.kvtransfer.transport.frames import HEADER_BYTES, FrameKind, Header, parse_header

_CHUNK_BYTES = 64 * 1024
_MESSAGES_WITH_PAYLOAD = (b"PUB", b"HPUB")


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that belong together. ``payload_bytes`` of them, the last ones, are content."""

    data: bytes
    counts: bool = False  # one that faults "every n" mean
    payload_bytes: int = 0


Splitter = Callable[[asyncio.StreamReader], AsyncIterator[Piece]]


def splitter(kind: str) -> Splitter:
    """For "kv" (frames with blocks count), "nats" (publications count); anything else: what was read, every time."""
    return {"kv": kv_frames, "nats": nats_messages}.get(kind, chunks)


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[Piece]:
    while data := await reader.read(_CHUNK_BYTES):
        yield Piece(data, counts=True, payload_bytes=len(data))


async def kv_frames(reader: asyncio.StreamReader) -> AsyncIterator[Piece]:
    """Frames of the data plane, from sender to receiver. What is no frame of this version passes as it is."""
    while True:
        head = await _exactly(reader, HEADER_BYTES)
        header = _header(head)
        if header is None:
            if head:
                yield Piece(head)
            async for piece in chunks(reader):
                yield Piece(piece.data)
            return
        body = await _exactly(reader, header.body_bytes)
        payload = b""
        if header.kind is FrameKind.BLOCKS:  # each entry ends with the size of its block
            block_bytes = int.from_bytes(body[len(body) // header.count - 4 : len(body) // header.count], "little")
            payload = await _exactly(reader, header.count * block_bytes)
        yield Piece(head + body + payload, header.kind is not FrameKind.HELLO, len(payload))


async def nats_messages(reader: asyncio.StreamReader) -> AsyncIterator[Piece]:
    """The client's side of the NATS protocol: lines, and payloads behind those that publish."""
    while line := await reader.readline():
        words = line.split()
        if not words or words[0].upper() not in _MESSAGES_WITH_PAYLOAD:
            yield Piece(line)
            continue
        payload = await _exactly(reader, int(words[-1]) + 2)  # the line's own end
        yield Piece(line + payload, counts=True, payload_bytes=len(payload))


async def _exactly(reader: asyncio.StreamReader, num_bytes: int) -> bytes:
    """So many bytes, or what there is before the end."""
    try:
        return await reader.readexactly(num_bytes)
    except asyncio.IncompleteReadError as error:
        return error.partial


def _header(head: bytes) -> Header | None:
    try:
        return parse_header(head) if len(head) == HEADER_BYTES else None
    except RemoteProtocolError:
        return None
