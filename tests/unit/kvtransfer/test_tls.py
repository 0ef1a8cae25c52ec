"""The data plane under TLS: the same bytes, certificates of workers on both ends, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.certificates import Authority, without_certificate
from helpers.kv_agents import COMPATIBILITY, Node, Prompt, assert_arrived, failure_of, hand_over, options, running
from helpers.waiting import eventually
from structlog.testing import capture_logs

from baton.kvtransfer.layout import Compatibility, KVLayout
from baton.kvtransfer.transport.frames import Header, pack_hello
from baton.kvtransfer.transport.stream import FrameStream, Outgoing, Payload
from baton.kvtransfer.transport.tls import TLSSocket
from baton.services.runtime.tls import TLSFiles
from baton.services.worker.environment import data_plane_identity

LARGE = Compatibility("model", KVLayout(num_layers=8, num_kv_heads=8, head_dim=64, block_size=16, dtype="float32"))


@dataclass
class World:
    folder: Path
    ca: Authority
    worker: TLSFiles


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("tls")
    ca = Authority(folder)
    return World(folder, ca, ca.issue("worker", "worker").in_use())


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("layout", [COMPATIBILITY, LARGE], ids=["small", "large"])
async def test_blocks_arrive_as_they_were_sent(transport: str, layout: Compatibility, world: World) -> None:
    common: dict[str, Any] = {"transports": transport, "compatibility": layout, "tls": world.worker}
    async with running("prefill-0", **common) as one, running("decode-0", **common) as other:
        for seed, node in enumerate((one, other)):
            node.fill(seed)
            node.host.free = list(range(16, 32))  # what is sent stays as it is
        there, back = Prompt(list(range(16)), request_id="there"), Prompt(list(range(16)), request_id="back")
        sent = (one.contents(), other.contents())
        reports = await asyncio.gather(hand_over(one, other, there), hand_over(other, one, back))
        assert [report.transport for report in reports] == [transport] * 2
        for node, prompt, contents in ((other, there, sent[0]), (one, back, sent[1])):
            for slot in node.host.slots[prompt.key]:
                assert node.block(slot.block_id) == contents[prompt.block_ids[slot.index]]


class Reader:
    """Takes frames whose payload goes into one buffer."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = memoryview(bytearray(num_bytes))
        self.num_left = num_bytes
        self.lost: list[str] = []

    def on_frame(self, header: Header, body: memoryview) -> Payload | None:
        return self

    def on_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def buffers(self, max_bytes: int, max_buffers: int) -> list[memoryview]:
        start = len(self.buffer) - self.num_left
        end = min(len(self.buffer), start + max_bytes)
        return [self.buffer[at : min(at + 5000, end)] for at in range(start, end, 5000)][:max_buffers]

    def advance(self, num_bytes: int) -> None:
        self.num_left -= num_bytes

    def cut(self) -> None:
        pass


async def test_a_socket_without_room_loses_no_byte(world: World) -> None:
    """Also not what was encrypted when there was no room any more, with nothing behind it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    identity = data_plane_identity(world.worker)
    accepting, connecting = TLSSocket(theirs, identity, accepts=True), TLSSocket(ours, identity, accepts=False)
    data = random.Random(3).randbytes(3_000_001)
    reader = Reader(len(data))
    receiver = FrameStream(accepting, reader, stall_s=30.0)  # type: ignore[arg-type]
    await connecting.shake_hands()
    sender = FrameStream(connecting, Reader(0), stall_s=30.0)  # type: ignore[arg-type]
    sender.send(Outgoing(pack_hello(bytes(16), bytes(32), 1), [memoryview(data)]))
    async with asyncio.timeout(30):
        await sender.drain()
    await eventually(lambda: reader.num_left == 0, what="the payload")
    assert bytes(reader.buffer) == data
    assert not connecting.has_unsent
    sender.close()
    await eventually(lambda: bool(reader.lost), what="the end")
    receiver.close()


async def still_serves(node: Node, world: World) -> None:
    async with running("prefill-1", tls=world.worker, incarnation=random.Random().randbytes(16).hex()) as sender:
        sender.fill(3)
        prompt = Prompt([1, 2], request_id=f"after-{sender.identity.incarnation}")
        await hand_over(sender, node, prompt)
        assert_arrived(sender, node, prompt)


def knock(node: Node, context: ssl.SSLContext | None) -> bytes:
    """What a client gets that connects and says something; raises what it sees."""
    host, _, port = node.agent.data_address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="baton-worker") if context is not None else plain as sock,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 8)
        return sock.recv(4096)


STRANGERS = {
    "no certificate": "the peer shows no certificate",
    "wrong CA": "the peer's certificate is refused",
    "expired": "certificate has expired",
    "wrong role": "that of gateway of test.example; this needs a worker of test.example",
    "another trust domain": "that of worker of elsewhere; this needs a worker of test.example",
}


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_stranger_is_refused_with_a_line_in_the_log(who: str, world: World) -> None:
    ca = world.ca
    context = {
        "no certificate": lambda: without_certificate(ca.path),
        "wrong CA": lambda: _trusting(
            ca, Authority(world.folder / "other", "other CA").issue("w", "worker").as_client()
        ),
        "expired": lambda: ca.issue("expired", "worker", from_day=-3, to_day=-1).as_client(),
        "wrong role": lambda: ca.issue("gateway", "gateway").as_client(),
        "another trust domain": lambda: ca.issue("far", "worker", trust_domain="elsewhere").as_client(),
    }[who]()
    async with running("decode-0", tls=world.worker) as node:
        with capture_logs() as logs:
            try:
                answer = await asyncio.to_thread(knock, node, context)
            except (ssl.SSLError, ConnectionError):
                answer = b""
            await eventually(lambda: any(log["event"] == "tls_peer_refused" for log in logs), what="the line")
            if "role" in who or "domain" in who:  # that is told inside the connection
                assert STRANGERS[who].encode() in answer
        line = next(log for log in logs if log["event"] == "tls_peer_refused")
        assert STRANGERS[who] in line["reason"]
        assert (line["log_level"], line["peer"], line["listener"]) == ("warning", "127.0.0.1", "KV data plane")
        await still_serves(node, world)


def _trusting(ca: Authority, context: ssl.SSLContext) -> ssl.SSLContext:
    context.load_verify_locations(ca.path)
    return context


async def test_a_plain_client_is_told_off(world: World) -> None:
    async with running("decode-0", tls=world.worker) as node:
        with capture_logs() as logs:
            answer = await asyncio.to_thread(knock, node, None)
            assert answer[:1] in (b"", b"\x15")  # nothing, or a TLS alert
        (line,) = [log for log in logs if log["event"] == "tls_peer_refused"]
        assert "does not speak TLS" in line["reason"]
        await still_serves(node, world)


async def test_a_handshake_that_does_not_go_on_is_bounded(world: World) -> None:
    bounds = options(hello_timeout_s=0.2, max_unknown_connections=2)
    async with running("decode-0", tls=world.worker, options=bounds) as node:
        host, _, port = node.agent.data_address.rpartition(":")
        connections = [await asyncio.open_connection(host, int(port)) for _ in range(8)]
        for _, writer in connections:
            writer.write(b"\x16\x03\x01\x02\x00")  # the beginning of a ClientHello
        async with asyncio.timeout(30):
            for reader, writer in connections:
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                writer.close()
        await still_serves(node, world)


async def test_the_sender_says_what_is_wrong_with_its_peer(world: World) -> None:
    """Control and data plane are configured together; whatever is on the data port, the words are clear."""
    silent = socket.create_server(("127.0.0.1", 0))
    async with running("prefill-0", tls=world.worker) as sender, running("decode-0", tls=world.worker) as receiver:
        plain = await asyncio.start_server(_say_nonsense, sock=silent)
        receiver.agent._receiving.data_address = f"127.0.0.1:{silent.getsockname()[1]}"
        error = await failure_of(sender, receiver, Prompt([1]))
        assert "does not speak TLS" in error.message
        plain.close()
        await plain.wait_closed()


async def _say_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await writer.drain()
    writer.close()


async def test_new_certificates_are_shown_to_who_comes_next(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    files = ca.issue("worker", "worker")
    tls = files.in_use()
    async with running("decode-0", tls=tls) as node:
        before = await asyncio.to_thread(_shown, node, files.as_client())
        files.key.write_text("half of a file")
        with capture_logs() as logs:
            assert await asyncio.to_thread(_shown, node, ca.issue("peer", "worker").as_client()) == before
        assert "the ones before stay in use" in logs[0]["event"]
        ca.issue("worker", "worker")
        after = await asyncio.to_thread(_shown, node, files.as_client())
        assert after != before


def _shown(node: Node, context: ssl.SSLContext) -> str:
    host, _, port = node.agent.data_address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="baton-worker") as sock,
    ):
        shown = sock.getpeercert()
        assert shown is not None
        return str(shown["serialNumber"])
