"""Probing workers: who is killed, and who is spared."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.waiting import eventually

from baton.services.local.probes import WorkerProbes

# A process with a health service: prints its port, then says what its argument says.
SCRIPT = """
import asyncio, sys, grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def main():
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(sys.argv[1]))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()

asyncio.run(main())
"""


class ProbedProcess:
    """A process as the probes know a child."""

    name = "decode-0"

    def __init__(self, says: str) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", SCRIPT, says], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"
        self.num_kills = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return not self.num_kills

    def kill(self) -> None:
        self.num_kills += 1

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[ProbedProcess]:
    made = ProbedProcess(getattr(request, "param", "SERVING"))
    yield made
    made.end()


def probes(child: ProbedProcess, said: list[str], *, unresponsive_after_s: float, rounds: list[int]) -> WorkerProbes:
    def describe() -> list[dict[str, Any]]:
        rounds.append(1)
        return [{"pid": child.pid, "address": child.address}] if len(rounds) < 3 else []  # then the gateway is away

    return WorkerProbes(
        lambda: [child],  # type: ignore[list-item]
        describe,
        unresponsive_after_s=unresponsive_after_s,
        say=said.append,
        every_s=0.05,
    )


async def test_one_that_is_stopped_is_killed_and_one_that_answers_is_not(child: ProbedProcess) -> None:
    said: list[str] = []
    rounds: list[int] = []
    running = asyncio.create_task(probes(child, said, unresponsive_after_s=3.0, rounds=rounds).run())
    await eventually(lambda: len(rounds) > 5, timeout_s=60.0, what="some probes")
    assert not said
    child.stop()
    await eventually(lambda: child.num_kills == 1, timeout_s=60.0, what="the kill")
    assert said[0].startswith("decode-0 has not answered for")
    running.cancel()


@pytest.mark.parametrize("child", ["NOT_SERVING"], indirect=True)
async def test_one_that_says_that_it_is_dead_is_killed_at_once(child: ProbedProcess) -> None:
    said: list[str] = []
    running = asyncio.create_task(probes(child, said, unresponsive_after_s=0.0, rounds=[]).run())
    await eventually(lambda: child.num_kills == 1, timeout_s=60.0, what="the kill")
    assert said == ["decode-0 says that it cannot go on; killing it"]
    running.cancel()
