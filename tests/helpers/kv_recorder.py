"""Records what two agents say to each other, as bytes: the wire of one version, frozen.

    PYTHONPATH=tests python -P -m helpers.kv_recorder tests/recorded/kv-wire-1

runs whole handoffs between two agents of the code that is installed, over gRPC and TCP, with a proxy in the middle that writes
down every message and frame: one JSON file a session, bytes in hex. It is run once for a version, **before** the code learns
the next one (``kvtransfer/README.md``, "Changing the wire"); the files are never recorded again. It knows nothing of the codec
but where a frame's lengths stand, so that it cannot agree with a mistake in it.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from helpers.kv_agents import FIRST_TOKEN, Node, Prompt, options, running
from helpers.waiting import eventually

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.kvtransfer.errors import TransferError
from baton.kvtransfer.layout import Compatibility, KVLayout
from baton.kvtransfer.service import SERVICE_NAME
from baton.services.runtime.net import free_port

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=16, dtype="float32")
COMPATIBILITY = Compatibility("recorded", LAYOUT)
NUM_BLOCKS = 8
BLOCK_IDS = [5, 2, 6]
SENDER_SEED = 41
METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["KVTransferService"].methods}

# A frame's header: magic, version, kind, 0, count, 0, bytes of the body, fence, token.
HEADER = struct.Struct("<4sHBBHHI16s32s")
KINDS = {1: "HELLO", 2: "BLOCKS", 3: "BLOCK_REFS", 4: "VERDICTS", 5: "GONE", 6: "CLOSE"}

Event = dict[str, Any]


async def read_frame(reader: asyncio.StreamReader, block_bytes: int) -> Event | None:
    """The next frame as an event; None at the end of the connection."""
    try:
        head = await reader.readexactly(HEADER.size)
        fields = HEADER.unpack(head)
        kind, count, body_bytes = KINDS[fields[2]], fields[4], fields[6]
        body = await reader.readexactly(body_bytes)
        payload = await reader.readexactly(count * block_bytes) if kind == "BLOCKS" else b""
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return {"frame": kind, "bytes": (head + body).hex(), "payload": payload.hex()}


class Recorder:
    """Stands between two agents and writes down what passes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.target_port = 0  # the receiver's data plane
        self.channel: grpc.aio.Channel
        self._connections: list[asyncio.Task[None]] = []

    def num(self, name: str) -> int:
        return sum(name in (event.get("frame"), event.get("call")) for event in self.events)

    async def forward(self, method: str, request: bytes) -> bytes:
        """One call of the control plane. Heartbeats repeat themselves; the first is enough."""
        response: bytes = await self.channel.unary_unary(f"/{SERVICE_NAME}/{method}")(request)
        if method != "Heartbeat" or not self.num(method):
            self.events.append({"call": method, "request": request.hex(), "response": response.hex()})
        return response

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the data plane."""
        there = await asyncio.open_connection("127.0.0.1", self.target_port)
        self._connections += [
            asyncio.create_task(self._pass_on("sender", reader, there[1])),
            asyncio.create_task(self._pass_on("receiver", there[0], writer)),
        ]

    async def _pass_on(self, source: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (event := await read_frame(reader, LAYOUT.block_bytes)) is not None:
            self.events.append({"from": source, **event})
            writer.write(bytes.fromhex(event["bytes"] + event["payload"]))
            await writer.drain()
        writer.close()

    async def close(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


class _Forwarding(grpc.GenericRpcHandler):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = handler_call_details.method.rpartition("/")[2]

        async def forward(request: bytes, context: object) -> bytes:
            return await self._recorder.forward(method, request)

        return grpc.unary_unary_rpc_method_handler(forward)


@asynccontextmanager
async def recorded_pair(transport: str) -> AsyncIterator[tuple[Recorder, Node, Node, str]]:
    """A sender, a receiver that has the second block of the prompt already, and the address to reach it by."""
    recorder, proxy_port = Recorder(), free_port("127.0.0.1")
    # A canary of one block; a heartbeat soon.
    common: dict[str, Any] = {"compatibility": COMPATIBILITY, "num_blocks": NUM_BLOCKS, "transports": transport}
    common["options"] = options(canary_bytes=1, heartbeat_s=0.05)
    async with (
        running("prefill-0", incarnation="a" * 32, **common) as sender,
        running("decode-0", incarnation="b" * 32, advertised_port=proxy_port, **common) as receiver,
    ):
        sender.fill(SENDER_SEED)
        receiver.host.already_here.add(Prompt(BLOCK_IDS).names[1])
        assert receiver.agent._listener is not None
        recorder.target_port = receiver.agent._listener.port
        data_proxy = await asyncio.start_server(recorder.connect, "127.0.0.1", proxy_port)
        recorder.channel = grpc.aio.insecure_channel(receiver.address)
        control_proxy = grpc.aio.server()
        control_proxy.add_generic_rpc_handlers((_Forwarding(recorder),))
        port = control_proxy.add_insecure_port("127.0.0.1:0")
        await control_proxy.start()
        try:
            yield recorder, sender, receiver, f"127.0.0.1:{port}"
        finally:
            await control_proxy.stop(None)
            await recorder.channel.close(None)
            data_proxy.close()
            await recorder.close()


@asynccontextmanager
async def recorded_blocks(transport: str) -> AsyncIterator[tuple[Recorder, Node, Prompt, Any]]:
    """The beginning of every session: a handoff all of whose blocks have landed."""
    async with recorded_pair(transport) as (recorder, sender, receiver, address):
        prompt = Prompt(BLOCK_IDS)
        receiver.agent.expect(prompt.key, sender.identity)
        handoff = sender.agent.open(prompt.spec(receiver, receiver_address=address))
        handoff.blocks_ready(prompt.all_ready)
        # The canary's verdicts, the blocks', and a heartbeat: then the order of what comes is the same in every recording.
        await eventually(lambda: recorder.num("VERDICTS") == 2 and recorder.num("Heartbeat") == 1)
        yield recorder, receiver, prompt, handoff


async def record_handoff(transport: str) -> list[Event]:
    """All of it, to the acknowledgement."""
    async with recorded_blocks(transport) as (recorder, *_, handoff):
        await handoff.commit(FIRST_TOKEN)
        return recorder.events


async def record_abort(transport: str) -> list[Event]:
    """The sender gives up when its blocks have landed."""
    async with recorded_blocks(transport) as (recorder, *_, handoff):
        await handoff.abort("nobody wants it")
        await eventually(lambda: recorder.num("Abort") == 1)
        return recorder.events


async def record_gone(transport: str) -> list[Event]:
    """The receiver gives up when the blocks have landed; then a stranger knocks at its data plane with a wrong token."""
    async with recorded_blocks(transport) as (recorder, receiver, prompt, handoff):
        receiver.agent.forget(prompt.key)
        with suppress(TransferError):
            await handoff.commit(FIRST_TOKEN)
        await eventually(lambda: recorder.num("GONE") == 1)
        hello = bytes.fromhex(next(event["bytes"] for event in recorder.events if event.get("frame") == "HELLO"))
        port = int(receiver.agent.data_address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hello[:-32] + bytes(32))
        await eventually(lambda: recorder.num("CLOSE") == 1)
        assert await reader.read()
        writer.close()
        return recorder.events


SESSIONS: dict[str, Callable[[], Awaitable[list[Event]]]] = {
    "handoff-tcp": lambda: record_handoff("tcp"),
    "handoff-shm": lambda: record_handoff("shm"),
    "aborted-tcp": lambda: record_abort("tcp"),
    "gone-tcp": lambda: record_gone("tcp"),
}


async def record(folder: Path) -> None:
    folder.mkdir(parents=True)  # never over an older recording
    for name, session in SESSIONS.items():
        events = await session()
        (folder / f"{name}.json").write_text(json.dumps(events, indent=1) + "\n")
        print(name, [event.get("call") or f"{event['from']}: {event['frame']}" for event in events])


if __name__ == "__main__":
    asyncio.run(record(Path(sys.argv[1])))
