"""``baton serve`` as a real process tree, for tests that talk to it as a client would."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from helpers.waiting import eventually_sync

START_TIMEOUT_S = 90.0


@dataclass
class Serving:
    """A running installation."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    lines: list[str] = field(default_factory=list)  # what it wrote on both outputs
    key: str | None = None  # sent with every request
    tls: ssl.SSLContext | None = None  # None: plain HTTP

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    @property
    def _defaults(self) -> dict[str, Any]:
        return {"headers": self.headers, **({} if self.tls is None else {"verify": self.tls})}

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30.0, **(self._defaults | kwargs))

    def post(self, path: str, json: Any, **kwargs: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=json, **(self._defaults | {"timeout": 60.0} | kwargs))

    def workers(self) -> list[dict[str, Any]]:
        return list(self.get("/v1/workers").json()["data"])

    def wait_for_workers(self, count: int) -> None:
        """All of them are there and ready; the first pair is enough for ``/ready``."""

        def all_ready() -> bool:
            return [worker["state"] for worker in self.workers()] == ["ready"] * count

        eventually_sync(all_ready, timeout_s=START_TIMEOUT_S, what=f"{count} workers")

    def held_blocks(self) -> dict[str, int]:
        """Everything that should be 0 once load has stopped, by worker and name."""
        held = {}
        for worker in self.workers():
            blocks = worker["kv_blocks"]
            assert sum(blocks[state] for state in blocks if state != "total") == blocks["total"]
            for name in ("request", "transfer", "quarantine"):
                held[f"{worker['id']} {name}"] = blocks[name]
            for name in ("overdue", "ledger_error", "queued", "running"):
                held[f"{worker['id']} {name}"] = worker[name]
        return held

    def assert_clean(self, timeout_s: float = 15.0) -> None:
        """Nothing is held on any worker, soon."""
        deadline = time.monotonic() + timeout_s
        while any((held := self.held_blocks()).values()):
            assert time.monotonic() < deadline, f"still held: { {k: v for k, v in held.items() if v} }"
            time.sleep(0.1)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def serving(
    *options: str, env: dict[str, str] | None = None, wait: bool = True, tls: ssl.SSLContext | None = None
) -> Iterator[Serving]:
    """Runs ``baton serve`` until the end of the block, and checks that no process of it is left. ``tls`` to speak to it."""
    port, grpc_port = free_ports(2)
    command = [
        sys.executable,
        "-m",
        "baton.services.local",
        "serve",
        "--port",
        str(port),
        "--grpc-port",
        str(grpc_port),
    ]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    server = Serving(process, port, grpc_port, tls=tls)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    tree: list[psutil.Process] = []
    try:
        if wait:
            _wait_until_ready(server)
            tree = server.children()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5.0)
        assert process.stdout is not None
        process.stdout.close()
        _, alive = psutil.wait_procs(tree, timeout=5.0)
        for child in alive:
            child.kill()
        assert not alive, f"left behind: {alive}"


def baton(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Another command, run to its end."""
    command = [sys.executable, "-m", "baton.services.local", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **(env or {})}
    )


def _wait_until_ready(server: Serving) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        output = "\n".join(server.lines[-40:])
        assert server.process.poll() is None, f"baton serve ended with {server.process.returncode}:\n{output}"
        assert time.monotonic() < deadline, f"not ready after {START_TIMEOUT_S:.0f} s:\n{output}"
        try:
            if server.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def _read(server: Serving) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line.rstrip("\n"))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
