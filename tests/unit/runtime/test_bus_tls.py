"""A NATS server that speaks TLS and asks for certificates."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.certificates import Authority
from helpers.waiting import eventually
from structlog.testing import capture_logs

from baton.services.local.child import Child, ChildSpec, program_argv
from baton.services.local.nats_server import find_nats_server
from baton.services.runtime.make_bus import make_bus
from baton.services.runtime.settings import GatewaySettings


@dataclass
class World:
    url: str
    ca: Authority
    server_ca: Path


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    ca, server_ca = Authority(tmp_path), Authority(tmp_path / "nats", "nats CA")
    files = server_ca.issue("nats", ips=("127.0.0.1",))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "nats.conf"
    config.write_text(
        f'host: 127.0.0.1\nport: {port}\ntls {{ cert_file: "{files.certificate}", key_file: "{files.key}", '
        f'ca_file: "{ca.path}", verify: true }}\n'
    )
    server = Child(ChildSpec("nats", program_argv(find_nats_server(), "--config", str(config))), tmp_path)
    await server.start()
    yield World(f"tls://127.0.0.1:{port}", ca, server_ca.path)
    await server.end(5)


async def test_a_process_shows_its_certificate_and_trusts_the_servers_ca(world: World) -> None:
    files = world.ca.issue("gateway", "gateway")
    settings = GatewaySettings.model_validate(
        {**files.options(), "nats_url": world.url, "nats_ca_file": str(world.server_ca)}
    )
    bus = make_bus(settings, "test")
    got: list[bytes] = []
    bus.subscribe("a", lambda subject, payload: got.append(payload))
    await bus.start()
    try:
        await eventually(lambda: bus.is_connected, timeout_s=30, what="the connection")
        bus.publish("a", b"hello")
        await eventually(lambda: got == [b"hello"], timeout_s=30, what="the message")
    finally:
        await bus.close()


async def test_a_ca_that_does_not_fit_is_a_line_in_the_log(world: World) -> None:
    files = world.ca.issue("gateway", "gateway")
    bus = make_bus(GatewaySettings.model_validate({**files.options(), "nats_url": world.url}), "test")
    with capture_logs() as logs:
        await bus.start()
        try:
            await eventually(lambda: _warned(logs), timeout_s=30, what="the line")
        finally:
            await bus.close()
    assert not bus.is_connected


def _warned(logs: object) -> bool:
    assert isinstance(logs, list)
    return any(log["log_level"] == "warning" and "certificate verify failed" in str(log.get("error")) for log in logs)
