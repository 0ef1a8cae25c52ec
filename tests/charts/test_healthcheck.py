"""The images' health check."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.services.healthcheck import main as healthcheck


@pytest.fixture
def http_status() -> Iterator[dict[str, int]]:
    """A server whose /health answers with what is put in here; its port is in BATON_PORT."""
    answer = {"/health": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer.get(self.path, 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        answer["port"] = server.server_port
        yield answer
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1)])
def test_health_of_a_gateway(
    http_status: dict[str, int], monkeypatch: pytest.MonkeyPatch, status: int, expected: int
) -> None:
    http_status["/health"] = status
    monkeypatch.setenv("BATON_PORT", str(http_status["port"]))
    monkeypatch.setenv("BATON_HOST", "0.0.0.0")
    assert healthcheck(["http"]) == expected


@pytest.mark.parametrize(("serving", "expected"), [(True, 0), (False, 1)])
def test_health_of_a_worker(monkeypatch: pytest.MonkeyPatch, serving: bool, expected: int) -> None:
    servicer = health.HealthServicer()
    status = health_pb2.HealthCheckResponse
    servicer.set("", status.SERVING if serving else status.NOT_SERVING)
    servicer.set("ready", status.NOT_SERVING)  # it may be draining: alive all the same
    with futures.ThreadPoolExecutor(1) as executor:
        server = grpc.server(executor)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        monkeypatch.setenv("BATON_PORT", str(server.add_insecure_port("127.0.0.1:0")))
        monkeypatch.delenv("BATON_HOST", raising=False)
        server.start()
        assert healthcheck(["grpc"]) == expected
        server.stop(None).wait()


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_nobody_there_is_not_healthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("BATON_PORT", str(free.getsockname()[1]))
        assert healthcheck([kind]) == 1
    assert "no answer" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "port"), [([], "1"), (["ftp"], "1"), (["http"], ""), (["http"], "x")])
def test_a_wrong_call_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], port: str
) -> None:
    monkeypatch.setenv("BATON_PORT", port)
    assert healthcheck(arguments) == 2
    assert "usage:" in capsys.readouterr().err
