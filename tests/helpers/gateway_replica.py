"""One more gateway for a running ``baton serve``: the same command, on ports of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from helpers.serving import START_TIMEOUT_S, Serving, free_ports
from helpers.waiting import eventually_sync


@dataclass
class Replica:
    """A gateway process, and what it answered to those who asked whether it is ready: status and word, repeats left out."""

    process: subprocess.Popen[bytes]
    url: str
    answers: list[tuple[int, str]] = field(default_factory=list)

    def wait_until_ready(self) -> None:
        eventually_sync(self._is_ready, timeout_s=START_TIMEOUT_S, what="a gateway that is ready")

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"the gateway ended with {self.process.returncode}"
        try:
            response = httpx.get(f"{self.url}/ready", timeout=30.0)
        except httpx.TransportError:
            return False
        said = response.json()
        answer = (response.status_code, said["status"] if response.status_code == 200 else said["error"]["code"])
        if self.answers[-1:] != [answer]:
            self.answers.append(answer)
        return response.status_code == 200


@contextmanager
def run_replica(serving: Serving, *options: str) -> Iterator[Replica]:
    """It runs until the end of the block, unless it has been ended before."""
    command = next(child.cmdline() for child in serving.children() if "gateway" in child.cmdline()[1:5])
    port, grpc_port = free_ports(2)
    # Of an option that is given twice the later one counts.
    command += ["--port", str(port), "--grpc-port", str(grpc_port), *options]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        yield Replica(process, f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
