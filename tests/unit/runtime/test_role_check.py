"""Internal gRPC: who has no certificate of the CA does not come in; who has one may call what its role is for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.certificates import Authority, Files
from helpers.waiting import eventually
from structlog.testing import capture_logs

from baton.api.decode.v1 import decode_pb2
from baton.api.kvtransfer.v1 import kvtransfer_pb2
from baton.api.prefill.v1 import prefill_pb2
from baton.api.worker.v1 import worker_pb2
from baton.services.runtime.certificates import NOBODY, Peer, peer_of
from baton.services.runtime.grpc import bind_server, create_channel, create_internal_server
from baton.services.runtime.health import Health
from baton.services.runtime.peers import ALLOWED, refusal
from baton.services.runtime.tls import TLSFiles

OPEN = "/baton.api.decode.v1.DecodeService/Open"
RESERVE = "/baton.api.kvtransfer.v1.KVTransferService/Reserve"
UNLISTED = "/baton.api.decode.v1.DecodeService/Invented"


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


class _Everything(grpc.GenericRpcHandler):  # type: ignore[misc]  # untyped base
    """Answers every method but those of others, unary and as a stream."""

    def service(self, details: Any) -> Any:
        if details.method.startswith("/grpc."):
            return None

        async def answer(request: bytes, context: Any) -> bytes:
            return b"answer"

        async def stream(requests: Any, context: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request

        if details.method == OPEN:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def serving(tls: TLSFiles) -> AsyncIterator[str]:
    server = create_internal_server(tls)
    server.add_generic_rpc_handlers([_Everything()])
    health = Health()
    health.add_to(server)
    port = bind_server(server, "127.0.0.1", 0, tls)
    await server.start()
    health.set_ready()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def call(address: str, tls: TLSFiles | None, method: str) -> bytes:
    async with create_channel(address, tls) as channel:
        if method == OPEN:
            stream = channel.stream_stream(method)(iter([b"said"]), timeout=30)
            return b"".join([answer async for answer in stream])
        return bytes(await channel.unary_unary(method)(b"", timeout=30))


async def refused(address: str, tls: TLSFiles | None, method: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(address, tls, method)
    return caught.value


async def test_a_role_may_call_what_is_its_own_and_nothing_else(ca: Authority) -> None:
    worker, gateway = ca.issue("worker", "worker").in_use(), ca.issue("gateway", "gateway").in_use()
    far = ca.issue("far", "gateway", trust_domain="elsewhere").in_use()
    none = ca.issue("none").in_use()
    async with serving(worker) as address:
        assert await call(address, gateway, OPEN) == b"said"
        assert await call(address, worker, RESERVE) == b"answer"
        cases = [(worker, OPEN), (gateway, RESERVE), (gateway, UNLISTED), (worker, UNLISTED), (far, OPEN), (none, OPEN)]
        for tls, method in cases:
            with capture_logs() as logs:
                error = await refused(address, tls, method)
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            shown = str(tls.current.certificate.peer)
            assert f"{method}: the certificate shown is that of {shown}" in str(error.details())
            (line,) = [log for log in logs if log["event"] == "tls_peer_refused"]
            assert (line["log_level"], line["certificate"], line["method"]) == ("warning", shown, method)
            assert line["peer"].startswith("ipv4:127.0.0.1:")
        for tls in (none, far):  # probes
            async with create_channel(address, tls) as channel:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("nobody", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("wrong CA", "unable to get local issuer certificate"),
        ("expired", "certificate has expired"),
        ("plain", "WRONG_VERSION_NUMBER"),
    ],
)
async def test_who_is_not_of_the_ca_does_not_come_in(
    who: str, words: str, ca: Authority, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = ca.issue("worker", "worker").in_use()
    heard: list[str] = []

    def said() -> str:
        heard.append(capfd.readouterr().err)  # gRPC writes it there itself
        return "".join(heard)

    async with serving(worker) as address:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with _stranger(who, address, ca, tmp_path) as channel:
                await channel.unary_unary(RESERVE)(b"", timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await eventually(lambda: words in said(), what="the line")
        assert await call(address, worker, RESERVE) == b"answer"


def _stranger(who: str, address: str, ca: Authority, folder: Path) -> grpc.aio.Channel:
    if who == "plain":
        return create_channel(address)
    root = ca.path.read_bytes()
    files: dict[str, Files] = {
        "wrong CA": Authority(folder, "other CA").issue("gateway", "gateway"),
        "expired": ca.issue("expired", "gateway", from_day=-3, to_day=-1),
    }
    shown = files.get(who)
    credentials = grpc.ssl_channel_credentials(
        root, shown.key.read_bytes() if shown else None, shown.certificate.read_bytes() if shown else None
    )
    return grpc.aio.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", "baton-worker")])


async def test_a_server_that_is_no_worker_gets_no_call(ca: Authority) -> None:
    impostor = ca.issue("impostor", "gateway").in_use()  # of the CA, without the workers' name
    async with serving(impostor) as address:
        error = await refused(address, ca.issue("gateway", "gateway").in_use(), OPEN)
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_with_tls_learns_that_the_server_has_none(ca: Authority) -> None:
    listener = await asyncio.start_server(_say_nonsense, "127.0.0.1", 0)
    async with listener:
        address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        error = await refused(address, ca.issue("gateway", "gateway").in_use(), RESERVE)
        assert "WRONG_VERSION_NUMBER" in str(error.details())


async def _say_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"no TLS here\r\n")
    await writer.drain()
    writer.close()


async def test_new_certificates_are_taken_up_by_server_and_client(tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new", "new CA")
    files, client_files = old.issue("worker", "worker"), old.issue("gateway", "gateway")
    worker, gateway = files.in_use(), client_files.in_use()
    async with serving(worker) as address:
        assert await call(address, gateway, OPEN) == b"said"
        both = old.path.read_bytes() + new.path.read_bytes()
        old.path.write_bytes(both)  # first the CA is made known on both sides, then certificates change
        new.issue("worker", "worker")
        for name in ("crt", "key"):
            (tmp_path / "new" / f"worker.{name}").replace(tmp_path / "old" / f"worker.{name}")
        assert await call(address, gateway, OPEN) == b"said"
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=30) as plain:
            context = client_files.as_client()
            context.load_verify_locations(new.path)
            with context.wrap_socket(plain, server_hostname="baton-worker") as sock:
                shown = sock.getpeercert()
        assert shown is not None
        assert shown["issuer"][0][0][1] == "new CA"


def test_every_internal_call_has_its_roles() -> None:
    modules = (prefill_pb2, decode_pb2, kvtransfer_pb2, worker_pb2)
    methods = {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    listed = {method for method in ALLOWED if method.startswith("/baton.")}
    assert listed == methods
    assert all(ALLOWED[method] for method in listed)


@pytest.mark.parametrize(
    ("uris", "peer"),
    [
        (["spiffe://a.example/baton/worker"], Peer("a.example", frozenset({"worker"}))),
        (
            ["spiffe://a/baton/worker", "spiffe://a/baton/gateway", "https://a/baton/planner"],
            Peer("a", frozenset({"worker", "gateway"})),
        ),
        (["spiffe://a/baton/worker", "spiffe://b/baton/gateway"], NOBODY),
        (["spiffe://a/x/baton/worker", "spiffe:///baton/worker", "spiffe://a/baton/", "spiffe://a/baton/w/x"], NOBODY),
        ([], NOBODY),
    ],
)
def test_roles_stand_in_uris(uris: list[str], peer: Peer) -> None:
    assert peer_of(uris) == peer


def test_nobody_is_refused_everywhere() -> None:
    assert refusal(NOBODY, "", frozenset({"worker"})) is not None
