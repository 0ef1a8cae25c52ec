"""Plays one side of a recorded session against an agent of today, over real gRPC and TCP, as a process of that version would.

A replayed sender says byte for byte what the recorded one said; what the agent answers must be byte for byte what the recorded
receiver answered. So the receiver's random tokens are made the recorded ones (``recorded_tokens``), and its host grants what
the recorded one granted. What cannot be the same is told apart by name: the port of the data plane, and for ``shm`` where
the sender's memory can be opened. Blocks may come in another grouping than then: frames are compared by what they carry.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from helpers.kv_recorder import HEADER, LAYOUT, Event, read_frame

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.service import SERVICE_NAME

RECORDED = Path(__file__).resolve().parents[1] / "recorded"
_ENTRY_BYTES = {"BLOCKS": 32, "BLOCK_REFS": 32, "VERDICTS": 8}


def load(version: int, session: str) -> list[Event]:
    events: list[Event] = json.loads((RECORDED / f"kv-wire-{version}" / f"{session}.json").read_text())
    return events


def calls(events: list[Event], method: str) -> list[Event]:
    return [event for event in events if event.get("call") == method]


def recorded_tokens(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver draws the tokens that the recorded one drew: the pair's, then the handoff's."""
    shaken = pb.HandshakeResponse.FromString(bytes.fromhex(calls(events, "Handshake")[0]["response"]))
    granted = pb.ReserveResponse.FromString(bytes.fromhex(calls(events, "Reserve")[0]["response"]))
    tokens: Iterator[bytes] = iter([shaken.data_token, granted.grant.transfer_token])
    monkeypatch.setattr("baton.kvtransfer.receiving.secrets.token_bytes", lambda num_bytes: next(tokens))


@dataclass
class Carried:
    """What frames carry, whatever the grouping: header fields that are the same in all, entries, payload by entry."""

    common: set[tuple[str, int, bytes, bytes]] = field(default_factory=set)  # kind, version, fence, token
    entries: dict[bytes, bytes] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        data, payload, kind = bytes.fromhex(event["bytes"]), bytes.fromhex(event["payload"]), event["frame"]
        _, version, _, _, count, _, _, fence, token = HEADER.unpack(data[: HEADER.size])
        self.common.add((kind, version, fence, token))
        body, size = data[HEADER.size :], _ENTRY_BYTES.get(kind, 0)
        if not size:
            self.entries[body] = b""
            return
        part = len(payload) // count
        for number in range(count):
            entry = body[number * size : (number + 1) * size]
            self.entries[entry] = payload[number * part : (number + 1) * part]


def _runs(events: list[Event]) -> list[list[Event]]:
    """One event after the other, but frames of one kind from one side that follow each other together."""
    runs: list[list[Event]] = []
    for event in events:
        previous = runs[-1][-1] if runs else {}
        is_same = "frame" in event and (previous.get("from"), previous.get("frame")) == (event["from"], event["frame"])
        runs[-1].append(event) if is_same else runs.append([event])
    return runs


async def _expect_frames(reader: asyncio.StreamReader, run: list[Event]) -> None:
    expected, got = Carried(), Carried()
    for event in run:
        expected.add(event)
    while len(got.entries) < len(expected.entries):
        async with asyncio.timeout(30):
            came = await read_frame(reader, LAYOUT.block_bytes)
        assert came is not None, f"the connection ended before {run[0]['frame']}"
        got.add(came)
    assert got == expected


class ReplayedSender:
    """Says what the sender of ``events`` said to the agent whose gRPC services are at ``address``, and checks its answers."""

    def __init__(self, events: list[Event], address: str, *, memory: SharedMemory | None = None) -> None:
        self.events = events
        self._address = address
        self._memory = memory
        self._data_address = ""
        self._reader: asyncio.StreamReader
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> ReplayedSender:
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def run(self) -> None:
        """What is in ``events`` now; the connection stays."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            for run in _runs(self.events):
                if "call" in run[0]:
                    await self._call(channel, run[0])
                elif run[0]["from"] == "sender":
                    await self._send(run)
                else:
                    await _expect_frames(self._reader, run)

    async def _call(self, channel: grpc.aio.Channel, event: Event) -> None:
        request, expected = bytes.fromhex(event["request"]), bytes.fromhex(event["response"])
        is_handshake = event["call"] == "Handshake"
        if is_handshake and self._memory is not None:
            shaking, memory = pb.HandshakeRequest.FromString(request), self._memory
            shaking.shared_memory.pid, shaking.shared_memory.fd = memory.pid, memory.fd
            shaking.shared_memory.num_bytes, shaking.shared_memory.nonce = memory.num_bytes, memory.nonce
            request = shaking.SerializeToString()
        response: bytes = await channel.unary_unary(f"/{SERVICE_NAME}/{event['call']}")(request, timeout=30)
        if is_handshake:
            shaken, then = pb.HandshakeResponse.FromString(response), pb.HandshakeResponse.FromString(expected)
            self._data_address, shaken.data_address = shaken.data_address, then.data_address
            response = shaken.SerializeToString()
        assert response.hex() == expected.hex(), event["call"]

    async def _send(self, run: list[Event]) -> None:
        if run[0]["frame"] == "HELLO":
            host, port = self._data_address.split(":")
            self._reader, writer = await asyncio.open_connection(host, int(port))
            self._writers.append(writer)
        for event in run:
            self._writers[-1].write(bytes.fromhex(event["bytes"] + event["payload"]))
            await self._writers[-1].drain()


class ReplayedReceiver:
    """Answers what the receiver of ``events`` answered, and checks what it is asked and sent. Use ``replayed_receiver``."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.asked: list[str] = []
        self.data_port = 0
        self.frames_done = asyncio.Event()
        self.failure: BaseException | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = handler_call_details.method.rpartition("/")[2]

        async def answer(request: bytes, context: object) -> bytes:
            return self._answer(method, request)

        return grpc.unary_unary_rpc_method_handler(answer)

    def _answer(self, method: str, request: bytes) -> bytes:
        self.asked.append(method)
        recorded = calls(self.events, method)[0]
        expected, response = bytes.fromhex(recorded["request"]), bytes.fromhex(recorded["response"])
        try:
            if method == "Handshake":
                assert _as_version_1_reads_it(request) == _as_version_1_reads_it(expected)
                shaken = pb.HandshakeResponse.FromString(response)
                shaken.data_address = f"127.0.0.1:{self.data_port}"
                response = shaken.SerializeToString()
            else:
                assert request.hex() == expected.hex(), method
        except AssertionError as error:
            self.failure = self.failure or error
            raise
        return response

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for run in _runs([event for event in self.events if "frame" in event]):
                if run[0]["from"] == "sender":
                    await _expect_frames(reader, run)
                else:
                    for event in run:
                        writer.write(bytes.fromhex(event["bytes"]))
                    await writer.drain()
            self.frames_done.set()
            await reader.read()
        except BaseException as error:
            self.failure = self.failure or error
            raise
        finally:
            writer.close()


def _as_version_1_reads_it(request: bytes) -> pb.HandshakeRequest:
    """Without the field that it does not know, and where the memory is: that is another one in each process."""
    parsed = pb.HandshakeRequest.FromString(request)
    parsed.compatibility.ClearField("newest_protocol_version")
    parsed.ClearField("shared_memory")
    parsed.ClearField("host_id")
    return parsed


@asynccontextmanager
async def replayed_receiver(events: list[Event]) -> AsyncIterator[tuple[ReplayedReceiver, str]]:
    """The receiver, and the address of its gRPC services."""
    replayed = ReplayedReceiver(events)
    data = await asyncio.start_server(replayed.connect, "127.0.0.1", 0)
    replayed.data_port = data.sockets[0].getsockname()[1]
    server: Any = grpc.aio.server()
    server.add_generic_rpc_handlers((replayed,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield replayed, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        data.close()
        await data.wait_closed()
