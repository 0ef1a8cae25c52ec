"""An installation with certificates everywhere: the same answers, and nobody in it who should not be."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from helpers.certificates import Authority, Files, without_certificate
from helpers.oracle import Subject, expected_tokens, make_prompt, make_subject
from helpers.serving import Serving, baton, serving
from helpers.waiting import eventually_sync

from baton.api.inference.v1 import inference_pb2, inference_pb2_grpc
from baton.api.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from baton.services.healthcheck import main as healthcheck
from baton.services.runtime.peers import WORKER_NAME

OPTIONS = ("--kv-cache-memory", "32MiB", "--dtype", "float32", "--served-model-name", "tiny", "--transport", "tcp")


@dataclass
class World:
    server: Serving
    ca: Authority  # of the processes
    clients: Authority
    client: Files
    public: Files
    other: Authority


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def world(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("certificates")
    ca, clients = Authority(folder / "processes"), Authority(folder / "clients", "clients CA")
    web = Authority(folder / "web", "web CA")
    public = web.issue("public", dns=("localhost",), ips=("127.0.0.1",))
    client = clients.issue("client")
    context = _speaking_to(web, client)
    options = [*ca.issue("all", "worker", "gateway").flags(), *public.flags("ssl"), "--ssl-ca-certs", str(clients.path)]
    with serving("--model", str(subject.path), *OPTIONS, *options, tls=context) as server:
        server.wait_for_workers(2)
        yield World(server, ca, clients, client, public, Authority(folder / "other", "other CA"))


def _speaking_to(web: Authority | Path, shown: Files) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(web.path if isinstance(web, Authority) else web))
    context.load_cert_chain(shown.certificate, shown.key)
    return context


def complete(world: World, prompt: tuple[int, ...]) -> list[int]:
    body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    response = world.server.post("/v1/completions", {**body, "return_token_ids": True})
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def test_answers_are_the_same_token_for_token(world: World, subject: Subject) -> None:
    for length in (1, 17, 130):
        prompt = make_prompt(length, seed=5)
        assert complete(world, prompt) == expected_tokens(subject, prompt)
    response = world.server.post("/v1/completions", {"model": "tiny", "prompt": list(make_prompt(65)), "max_tokens": 2})
    receipt = world.server.get(f"/v1/requests/{response.json()['id']}").json()
    assert (receipt["decision"]["mode"], receipt["transfer"]["path"]) == ("remote", "tcp")


STRANGERS = ("no certificate", "wrong CA", "expired")


def _shown(world: World, who: str, issuer: Authority, *roles: str) -> Files | None:
    if who == "no certificate":
        return None
    if who == "wrong CA":
        return world.other.issue("stranger", *roles)
    return issuer.issue("expired", *roles, from_day=-3, to_day=-1)


@pytest.mark.parametrize("who", STRANGERS)
def test_rest_is_closed_to_strangers(who: str, world: World, subject: Subject) -> None:
    shown = _shown(world, who, world.clients)
    begin = len(world.server.lines)
    if shown is None:
        context = without_certificate(world.public.ca)
        assert world.server.get("/health", verify=context).status_code == 200
        answer = world.server.get("/v1/models", verify=context)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
        assert "certificate" in answer.json()["error"]["message"]
    else:
        with pytest.raises(httpx.TransportError):
            world.server.get("/v1/models", verify=_speaking_to(world.public.ca, shown))
        words = "expired" if who == "expired" else "certificate"
        eventually_sync(lambda: _said(world, begin, "tls_peer_refused", "REST", words), what="the line", timeout_s=30)
    _is_alive(world, subject)


@pytest.mark.parametrize("who", STRANGERS)
def test_grpc_is_closed_to_strangers(who: str, world: World, subject: Subject) -> None:
    begin = len(world.server.lines)
    shown = _shown(world, who, world.clients)
    with _channel(world.server.grpc_port, world.public.ca, shown) as channel, pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceServiceStub(channel).ListModels(inference_pb2.ListModelsRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]  # the stubs lack it
    eventually_sync(lambda: _said(world, begin, _GRPC_WORDS[who]), what="the line", timeout_s=30)
    with _channel(world.server.grpc_port, world.public.ca, world.client) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert stub.ListModels(inference_pb2.ListModelsRequest(), timeout=30).models
    _is_alive(world, subject)


_GRPC_WORDS = {
    "no certificate": "PEER_DID_NOT_RETURN_A_CERTIFICATE",
    "wrong CA": "CERTIFICATE_VERIFY_FAILED",
    "expired": "certificate has expired",
}


@pytest.mark.parametrize("who", [*STRANGERS, "wrong role"])
def test_workers_are_closed_to_strangers(who: str, world: World, subject: Subject) -> None:
    begin = len(world.server.lines)
    port = int(world.server.workers()[0]["address"].rpartition(":")[2])
    shown = world.ca.issue("gateway", "gateway") if who == "wrong role" else _shown(world, who, world.ca, "worker")
    with _channel(port, world.ca.path, shown, WORKER_NAME) as channel:
        stub = kvtransfer_pb2_grpc.KVTransferServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Handshake(kvtransfer_pb2.HandshakeRequest(), timeout=30)
    code = caught.value.code()  # type: ignore[attr-defined]  # the stubs lack it
    if who == "wrong role":
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "gateway of test.example" in caught.value.details()  # type: ignore[attr-defined]
        words: tuple[str, ...] = ("tls_peer_refused", "gateway of test.example", "Handshake")
    else:
        assert code is grpc.StatusCode.UNAVAILABLE
        words = (_GRPC_WORDS[who],)
    eventually_sync(lambda: _said(world, begin, *words), what="the line", timeout_s=30)
    _is_alive(world, subject)


def test_clients_that_speak_plainly_are_told_off(world: World, subject: Subject) -> None:
    begin = len(world.server.lines)

    def is_told_off() -> bool:
        """Another test may have been a moment ago: the same line about the same peer comes once in ten seconds."""
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{world.server.port}/health", timeout=30)
        return _said(world, begin, "tls_peer_refused", "https://")

    eventually_sync(is_told_off, what="the line", timeout_s=60)
    command = baton("status", "--url", f"http://127.0.0.1:{world.server.port}")
    assert (command.returncode, "https://" in command.stderr) == (1, True)
    _is_alive(world, subject)


def test_handshakes_that_do_not_go_on_hold_up_nobody(world: World, subject: Subject) -> None:
    """More of them than there may be at once; those that are pushed out leave no descriptor behind."""
    gateway = next(child for child in world.server.children() if "gateway" in child.cmdline())
    before = gateway.num_fds()
    silent = [socket.create_connection(("127.0.0.1", world.server.port), timeout=60) for _ in range(600)]
    try:
        _is_alive(world, subject)
        assert silent[0].recv(1) == b""  # the oldest had to go
    finally:
        for each in silent:
            each.close()
    eventually_sync(lambda: gateway.num_fds() <= before + 10, what="the descriptors", timeout_s=60)


def test_commands_take_a_ca_and_a_certificate(world: World) -> None:
    shown = {"BATON_CLIENT_CERT_FILE": str(world.client.certificate), "BATON_CLIENT_KEY_FILE": str(world.client.key)}
    url = f"https://localhost:{world.server.port}"
    good = baton("status", "--url", url, "--ca-file", str(world.public.ca), env=shown)
    assert good.returncode == 0, good.stderr
    assert "decode-0" in good.stdout
    unknown = baton("status", "--url", url, env=shown)
    assert (unknown.returncode, "--ca-file" in unknown.stderr) == (1, True)
    bare = baton("status", "--url", url, env={"SSL_CERT_FILE": str(world.public.ca)})
    assert (bare.returncode, "certificate" in bare.stderr) == (1, True)


def test_the_load_generator_takes_a_ca_and_measures(world: World, tmp_path: Path) -> None:
    shown = {"BATON_CLIENT_CERT_FILE": str(world.client.certificate), "BATON_CLIENT_KEY_FILE": str(world.client.key)}
    output = tmp_path / "result.json"
    asked = ("--url", f"https://localhost:{world.server.port}", "--output", str(output), "--num-warmups", "0")
    few = ("--num-prompts", "3", "--arrival", "all-at-once", "--input-len", "16", "--output-len", "4")
    unknown = baton("bench", *asked, *few, env=shown)
    assert (unknown.returncode, "--ca-file" in unknown.stderr) == (1, True), unknown.stderr
    good = baton("bench", *asked, *few, "--ca-file", str(world.public.ca), env=shown)
    assert good.returncode == 0, good.stderr
    result = json.loads(output.read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (3, 0, 12)


def test_the_images_health_check_asks_with_tls(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    files = world.ca.issue("probe", "worker")
    monkeypatch.setenv("BATON_PORT", world.server.workers()[0]["address"].rpartition(":")[2])
    monkeypatch.setenv("BATON_HOST", "127.0.0.1")
    assert healthcheck(["grpc"]) == 1
    for name, path in (("CERT", files.certificate), ("KEY", files.key), ("CA", files.ca)):
        monkeypatch.setenv(f"BATON_TLS_{name}_FILE", str(path))
    assert healthcheck(["grpc"]) == 0
    assert healthcheck(["grpc", "ready"]) == 0
    monkeypatch.setenv("BATON_PORT", str(world.server.port))
    assert healthcheck(["http"]) == 1
    monkeypatch.setenv("BATON_SSL_CERTFILE", str(world.public.certificate))
    assert healthcheck(["http"]) == 0


def test_a_new_certificate_is_shown_without_a_restart(world: World, subject: Subject) -> None:
    address = ("127.0.0.1", world.server.port)
    before = ssl.get_server_certificate(address)
    web = Authority(world.public.ca.parent, "web CA")  # the CA changes as well: nobody but its clients has to know
    web.issue("public", dns=("localhost",), ips=("127.0.0.1",))
    assert ssl.get_server_certificate(address) != before
    world.server.tls = _speaking_to(web, world.client)
    with _channel(world.server.grpc_port, web.path, world.client) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert stub.ListModels(inference_pb2.ListModelsRequest(), timeout=30).models
    world.ca.issue("all", "worker", "gateway")
    _is_alive(world, subject)


def _is_alive(world: World, subject: Subject) -> None:
    prompt = make_prompt(33, seed=9)
    assert complete(world, prompt) == expected_tokens(subject, prompt)


def _said(world: World, begin: int, *words: str) -> bool:
    return any(all(word in line for word in words) for line in world.server.lines[begin:])


def _channel(port: int, ca: Path, shown: Files | None, name: str = "localhost") -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(),
        shown.key.read_bytes() if shown is not None else None,
        shown.certificate.read_bytes() if shown is not None else None,
    )
    options = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options)
