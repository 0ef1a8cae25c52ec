"""``baton serve``, or a gateway alone, as a child process, for benchmarks that measure what a client sees."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 180.0


@contextmanager
def serve(*options: str, log: Path) -> Iterator[str]:
    """Runs it until the end of the block and yields its URL. Its output goes to ``log``."""
    with _run("serve", *options, log=log) as url:
        yield url


@contextmanager
def gateway(worker: str, *, log: Path) -> Iterator[str]:
    """Only the gateway, with the bundled model's tokenizer, before one worker that is there already."""
    with _run("gateway", "--nats-url", "none", "--worker", worker, "--log-level", "warning", log=log) as url:
        yield url


@contextmanager
def _run(command_name: str, *options: str, log: Path) -> Iterator[str]:
    port, grpc_port = _free_port(), _free_port()
    ports = ("--port", str(port), "--grpc-port", str(grpc_port))
    command = [sys.executable, "-m", "baton.services.local", command_name, *ports]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  our own server on loopback
        return json.load(response)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"baton serve did not become ready:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
