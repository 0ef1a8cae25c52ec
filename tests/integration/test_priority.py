"""``priority`` through real processes: a worker with one seat takes the lowest number first, whoever came first."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
from helpers.oracle import make_subject
from helpers.serving import Serving, serving
from helpers.waiting import eventually_sync

OPTIONS = ("--kv-cache-memory", "16MiB", "--dtype", "float32", "--served-model-name", "tiny", "--mode", "colocated")
PATIENCE_S = 120.0


# Whoever has the seat keeps it until it is told to go: each of its steps takes a while.
SLOW_TOKEN = 7
SLOW = f"engine.step_hang=delay(100):token({SLOW_TOKEN})"


def body(number: int, **fields: Any) -> dict[str, Any]:
    """Without hurry, so that all wait on the worker and none in front of it."""
    slo = {"ttft_ms": 3e6, "tpot_ms": 1e5}
    return {"model": "tiny", "prompt": [number, *range(10, 30)], "ignore_eos": True, "slo": slo, **fields}


def num_queued(server: Serving) -> int:
    return sum(worker["queued"] for worker in server.workers())


def ended(server: Serving) -> list[int]:
    """As the gateway says it: clients' threads hear of it in any order."""
    lines = [line for line in list(server.lines) if '"request ended"' in line and "priority:" in line]
    return [int(line.partition("priority:")[2].partition(":")[0]) for line in lines]


def test_the_lowest_priority_of_those_that_wait_is_served_first(tmp_path: Path) -> None:
    subject = make_subject("qwen3", tmp_path / "model")
    options = (*OPTIONS, "--max-num-seqs", "1", "--failpoints", SLOW, "--log-level", "debug", "--log-format", "json")
    with serving("--model", str(subject.path), *options) as server:
        answered: list[int] = []

        def ask(priority: int) -> None:
            response = server.post(
                "/v1/completions",
                body(priority + 50, priority=priority, max_tokens=2),
                headers={"x-request-id": f"priority:{priority}:"},
                timeout=PATIENCE_S,
            )
            answered.append(response.status_code)

        asking = [threading.Thread(target=ask, args=(priority,)) for priority in (9, 0, -3)]
        long = body(SLOW_TOKEN, stream=True, max_tokens=900)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=PATIENCE_S) as stream:
            lines = stream.iter_lines()
            next(lines)  # it has the seat
            for number, thread in enumerate(asking, start=1):
                thread.start()
                eventually_sync(
                    lambda wanted=number: num_queued(server) == wanted, timeout_s=PATIENCE_S, what="the queue"
                )
        for thread in asking:
            thread.join(PATIENCE_S)
        assert answered == [200] * 3
        eventually_sync(lambda: len(ended(server)) == 3, timeout_s=PATIENCE_S, what="their lines in the log")
        assert ended(server) == [-3, 0, 9]
        refused = server.post("/v1/completions", body(1, priority=2**31))
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "priority"
