"""Workers that hang, are silent or run out of memory, under ``baton serve``: noticed, replaced, and serving again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import grpc
import psutil
import pytest
from helpers.oracle import Subject, expected_tokens, make_prompt, make_subject
from helpers.serving import Serving, serving
from helpers.waiting import eventually_sync

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.services.worker.watchdog import STUCK_STATUS

OPTIONS = ("--kv-cache-memory", "32MiB", "--max-num-seqs", "32", "--dtype", "float32", "--served-model-name", "tiny")
OPTIONS += ("--failpoints", "on", "--replace-unresponsive-after-s", "3", "--stuck-after-s", "3")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(subject: Subject) -> Iterator[Serving]:
    with serving("--model", str(subject.path), *OPTIONS) as running:
        yield running


def worker(server: Serving, worker_id: str) -> dict[str, object]:
    return next(row for row in server.workers() if row["id"] == worker_id)


def set_failpoints(server: Serving, worker_id: str, text: str) -> None:
    with grpc.insecure_channel(str(worker(server, worker_id)["address"])) as channel:
        stub = worker_pb2_grpc.FailpointServiceStub(channel)
        stub.SetFailpoints(worker_pb2.SetFailpointsRequest(failpoints=text), timeout=30)


def assert_replaced(server: Serving, subject: Subject, worker_id: str, old_pid: object) -> None:
    """Another process serves in its place, and gives right answers."""
    eventually_sync(
        lambda: any(
            row["id"] == worker_id and row["state"] == "ready" and row["pid"] != old_pid for row in server.workers()
        ),
        timeout_s=90,
        what=f"another {worker_id}",
    )
    eventually_sync(lambda: server.get("/ready").status_code == 200, timeout_s=60, what="readiness")
    assert not psutil.pid_exists(int(str(old_pid)))
    prompt = make_prompt(40, seed=5)
    body = {"model": "tiny", "prompt": list(prompt), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", {**body, "return_token_ids": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == expected_tokens(subject, prompt)
    server.assert_clean()


def test_a_worker_that_hangs_ends_itself_and_is_replaced(server: Serving, subject: Subject) -> None:
    old_pid = worker(server, "decode-0")["pid"]
    set_failpoints(server, "decode-0", "decode.step_n=hang:after(3)")
    # In the background: it waits for the replacement, or is given up before.
    body = {"model": "tiny", "prompt": list(make_prompt(30, seed=6)), "max_tokens": 50, "ignore_eos": True}
    asking = threading.Thread(target=server.post, args=("/v1/completions", body))
    asking.start()
    told = f"decode-0 ended with status {STUCK_STATUS}"
    eventually_sync(lambda: any(told in line for line in server.lines), timeout_s=90, what=told)
    assert any("no step ended for" in line for line in server.lines)
    assert any("step_loop.py" in line for line in server.lines)  # the stacks
    asking.join(120)
    assert_replaced(server, subject, "decode-0", old_pid)


def test_a_worker_that_does_not_answer_is_killed_and_replaced(server: Serving, subject: Subject) -> None:
    old_pid = worker(server, "decode-0")["pid"]
    psutil.Process(int(str(old_pid))).send_signal(signal.SIGSTOP)
    told = "decode-0 has not answered for"
    eventually_sync(lambda: any(told in line for line in server.lines), timeout_s=90, what=told)
    assert_replaced(server, subject, "decode-0", old_pid)
