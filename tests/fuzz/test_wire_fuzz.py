"""Structure-aware fuzzing of both planes of a transfer agent.

BATON_FUZZ_FRAMES makes it longer, BATON_FUZZ_SEED another one.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from helpers.kv_agents import FIRST_TOKEN, Prompt, hand_over, options, running
from helpers.kv_raw_peer import RawPeer, blocks_frame, raw_peer
from helpers.waiting import eventually
from helpers.wire_fuzzer import MOVES, WireFuzzer

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.api.kvtransfer.v1.kvtransfer_pb2_grpc import KVTransferServiceStub
from baton.kvtransfer import messages as m
from baton.kvtransfer import wire
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.handshake import Handshake
from baton.kvtransfer.identity import pair_digest
from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.service import open_local_channel
from baton.kvtransfer.transport import frames
from baton.kvtransfer.transport.base import Offer

NUM_FRAMES = int(os.environ.get("BATON_FUZZ_FRAMES", "3000"))
SEED = int(os.environ.get("BATON_FUZZ_SEED", "1"))
# Nothing times out while the machine is busy: what ends, ends because of what was sent.
PATIENT = options(limits={"lease_s": 120.0}, hello_timeout_s=60.0, stall_s=60.0, rpc_timeout_s=60.0)


@pytest.mark.timeout(3600)
async def test_no_frame_writes_outside_its_grant_or_stops_the_worker() -> None:
    async with running("decode-0", options=PATIENT) as node, raw_peer(node) as peer:
        node.fill(1)
        await peer.shake_hands()
        fuzzer = WireFuzzer(node, peer, SEED)
        while fuzzer.num_frames < NUM_FRAMES:
            await fuzzer.run_round()
        await fuzzer.close()
        print(f"seed {SEED}: {fuzzer.num_frames} frames, {fuzzer.num_commits} commits, {dict(fuzzer.moves)}")
        assert set(fuzzer.moves) == {*MOVES, "late"}
        assert fuzzer.num_commits > NUM_FRAMES / 200
        await eventually(lambda: node.agent.stats().num_receiving == 0)
        assert sorted(node.host.free) == list(range(node.memory.num_blocks))
        async with running("prefill-1", options=PATIENT) as sender:  # and a good one is served as ever
            sender.fill(3)
            await hand_over(sender, node, Prompt([1, 2], request_id="after"))


HUGE = {
    "body of 4 GiB": (12, struct.pack("<I", 2**32 - 1)),
    "65,535 entries": (8, struct.pack("<H", 65535)),
    "65,535 entries in a body that fits": (8, struct.pack("<HHI", 65535, 0, 65535 * 32)),
    "block of 4 GiB": (frames.HEADER_BYTES + 28, struct.pack("<I", 2**32 - 1)),
    "unknown kind": (6, b"\x63"),
}


@pytest.mark.parametrize("name", HUGE)
async def test_nothing_over_64_kib_is_allocated_before_a_frame_is_validated(name: str) -> None:
    offset, value = HUGE[name]
    async with running("decode-0", options=PATIENT) as node, raw_peer(node) as peer:
        await peer.shake_hands()
        handoff = peer.handoff()
        grant = await peer.reserve(handoff, [b"n" * 16])
        good = blocks_frame(handoff, grant, {0: bytes(node.memory.block_bytes)})
        bad = (good[:offset] + value + good[offset + len(value) :])[: frames.HEADER_BYTES + 32]
        await send_and_await_close(peer, bad)  # whatever is made once is there now
        tracemalloc.start()
        try:
            for _ in range(20):
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                await send_and_await_close(peer, bad)
                _, peak = tracemalloc.get_traced_memory()
                assert peak - before < 64 * 1024
        finally:
            tracemalloc.stop()


async def send_and_await_close(peer: RawPeer, data: bytes) -> None:
    """Over a socket of its own, since asyncio's streams allocate more than what is looked for here."""
    loop = asyncio.get_running_loop()
    host, port = peer.reply.data_address.split(":")
    hello = frames.pack_hello(pair_digest(peer.identity, peer.node.identity), peer.reply.data_token)
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, (host, int(port)))
        await loop.sock_sendall(sock, hello + data)
        try:
            async with asyncio.timeout(60):
                while await loop.sock_recv(sock, 4096):
                    pass
        except ConnectionError:
            pass


# The control plane.

METHODS = ("Handshake", "Reserve", "Commit", "Abort", "Heartbeat")
EXPECTED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED}


async def test_no_message_of_the_control_plane_is_answered_with_an_internal_error() -> None:
    """Good messages, spoiled in one to three fields anywhere in them, and random bytes in their place."""
    rng = random.Random(SEED)
    async with running("decode-0", options=PATIENT) as node, raw_peer(node) as peer:
        node.fill(1)
        await peer.shake_hands()
        before = node.contents()
        async with open_local_channel(node.address) as channel:
            for number in range(NUM_FRAMES // 4):
                method = METHODS[number % len(METHODS)]
                good = good_message(method, peer, number)
                payload = (
                    spoiled(good, rng).SerializeToString() if rng.random() < 0.8 else rng.randbytes(rng.randrange(99))
                )
                call = channel.unary_unary(f"/{pb.DESCRIPTOR.services_by_name['KVTransferService'].full_name}/{method}")
                # A reservation that nobody announced waits for its announcement: it is not waited for here.
                code, details = await outcome(call(payload, timeout=0.05 if method == "Reserve" else 30))
                assert code in EXPECTED, (method, details)
            stub: Any = KVTransferServiceStub(channel)
            await stub.Abort(good_message("Abort", peer, 0), timeout=30)
        assert node.contents() == before
        async with running("prefill-1", options=PATIENT) as sender:
            sender.fill(3)
            await hand_over(sender, node, Prompt([1, 2], request_id="after"))


async def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    with suppress(grpc.aio.AioRpcError):
        await call
    return await call.code(), await call.details()


def good_message(method: str, peer: RawPeer, number: int) -> Message:
    handoff = peer.handoff(f"r{number}", 1)
    endpoints = wire.endpoints_to_wire(peer.identity, peer.node.identity)
    match method:
        case "Handshake":
            offer = Offer("host", SharedMemory(7, 9, 4096, b"n" * 16))
            compatibility = peer.node.agent._context.compatibility
            return wire.handshake_to_wire(
                Handshake(peer.identity, peer.node.identity, compatibility, ("tcp", "shm"), offer)
            )
        case "Reserve":
            return wire.reserve_to_wire(m.Reserve(handoff, (b"n" * 16,) * 3, 40, "tcp"))
        case "Commit":
            return wire.commit_to_wire(m.Commit(handoff, bytes(32), FIRST_TOKEN, 0, 1))
        case "Abort":
            return wire.abort_to_wire(m.Abort(handoff, TransferCode.ABORTED, "why"))
        case _:
            return pb.HeartbeatRequest(endpoints=endpoints, live=[wire.key_to_wire(handoff.key)])


def spoiled(message: Message, rng: random.Random) -> Message:
    for _ in range(rng.randint(1, 3)):
        spoil_one(message, rng)
    return message


def spoil_one(message: Message, rng: random.Random) -> None:
    """Sets, clears or repeats one field, of the message or of one inside it."""
    field = rng.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if field.is_repeated:
        odd = rng.choice([0, 1, 17, 5000])
        if field.message_type is not None:
            for _ in range(odd):
                value.add()
        else:
            value.extend([odd_value(field, rng) for _ in range(odd)])
    elif field.message_type is not None:
        if rng.random() < 0.3:
            message.ClearField(field.name)
        else:
            value.SetInParent()
            spoil_one(value, rng)
    else:
        setattr(message, field.name, odd_value(field, rng))


def odd_value(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(["", "x", "\0", "../../x", "ü" * 3000])
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e300 if field.cpp_type == 5 else 1e30])
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice([0, 1, 999])
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_INT64:
            return rng.choice([0, -1, 2**31 - 1, -(2**31)])
        case _:
            return rng.choice([0, 1, 2**31, 2**32 - 1])
