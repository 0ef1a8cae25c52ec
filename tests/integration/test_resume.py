"""Real processes that are killed, stopped and woken under streams: the client notices nothing, and nothing stays held."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import psutil
import pytest
from helpers.oracle import Subject, make_prompt, make_subject
from helpers.serving import Serving, serving
from helpers.streams import PATIENCE_S, Stream
from helpers.waiting import eventually_sync

# Workers that a test stops are not replaced: they are to wake again.
OPTIONS = ("--kv-cache-memory", "32MiB", "--dtype", "float32", "--served-model-name", "tiny")
# Nor does a worker that is asked to leave wait for the end of its streams.
OPTIONS += ("--replace-unresponsive-after-s", "0", "--drain-timeout-s", "0.05")
# A stream lasts a second on any machine: whoever has seen some of it finds it still under way.
OPTIONS += ("--failpoints", "decode.step_n=delay(5)")
NUM_TOKENS = 200
GREEDY = {"temperature": 0}
SEEDED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 7,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.1,
    "logit_bias": {"17": 2.0},
    "min_tokens": 150,
}
LOGPROBS = {"temperature": 0, "logprobs": 2}
# Eighty tokens or so that a random model would never say.
ROWS = {"type": "array", "minItems": 30, "maxItems": 30, "items": {"enum": [1, 22, 333]}}
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
SCHEMA = {"structured_outputs": {"grammar": f"start: %json {json.dumps(ROWS | COMPACT)}"}, "ignore_eos": False}
KINDS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "logprobs": LOGPROBS,
    "schema": SCHEMA | GREEDY,
    "seeded schema": SCHEMA | SEEDED,
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(subject: Subject) -> Iterator[Serving]:
    with serving("--model", str(subject.path), *OPTIONS, "--prefill", "2", "--decode", "2") as running:
        running.wait_for_workers(4)
        yield running


def start(server: Serving, number: int, **parameters: Any) -> Stream:
    body = {
        "model": "tiny",
        "prompt": list(make_prompt(40, seed=number)),
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return Stream(server, {**body, **parameters})


@pytest.fixture(scope="module")
def expected(server: Serving) -> dict[str, Stream]:
    """What each kind of request answers when nothing fails."""
    answers = {kind: start(server, 5, **parameters).finish() for kind, parameters in KINDS.items()}
    text = answers["greedy"].text
    stop = next(text[i : i + 5] for i in range(len(text) // 2, len(text)) if text.find(text[i : i + 5]) == i)
    answers["stop"] = start(server, 5, **GREEDY, stop=[stop]).finish()
    assert answers["stop"].finish_reason == "stop"
    assert 20 < len(answers["stop"].tokens) < NUM_TOKENS
    for kind in ("schema", "seeded schema"):
        assert len(json.loads(answers[kind].text)) == 30
        assert answers[kind].finish_reason == "stop"
    return answers


def start_all(server: Serving, expected: dict[str, Stream], copies: int = 1) -> list[tuple[str, Stream]]:
    """One stream of each kind, and a few more, so that every worker has some."""
    return [(kind, Stream(server, answer.body)) for kind, answer in expected.items() for _ in range(copies)]


def check_all(streams: list[tuple[str, Stream]], expected: dict[str, Stream]) -> None:
    for kind, stream in streams:
        wanted = expected[kind]
        stream.finish()
        assert stream.tokens == wanted.tokens, kind
        assert (stream.text, stream.finish_reason) == (wanted.text, wanted.finish_reason), kind
        for figure in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert stream.usage[figure] == wanted.usage[figure], kind
        assert stream.logprobs == pytest.approx(wanted.logprobs, abs=1e-3), kind


def workers(server: Serving, role: str) -> list[psutil.Process]:
    return [psutil.Process(worker["pid"]) for worker in server.workers() if worker["role"] == role]


def whole(server: Serving) -> bool:
    return [worker["state"] for worker in server.workers()] == ["ready"] * 4


def is_ready(server: Serving) -> bool:
    try:
        return server.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def serving_worker(stream: Stream, role: str) -> psutil.Process:
    """The worker of the role that the stream was given to, as its receipt says: the list of workers may be a second old."""
    name = stream.receipt["attempts"][-1][role]
    return next(psutil.Process(worker["pid"]) for worker in stream.server.workers() if worker["id"] == name)


@contextmanager
def healing(server: Serving) -> Iterator[None]:
    """Before and after, every worker is there and holds nothing."""
    eventually_sync(lambda: whole(server), timeout_s=PATIENCE_S, what="all four workers")
    yield
    eventually_sync(lambda: whole(server), timeout_s=PATIENCE_S, what="the return of the workers")
    server.assert_clean(PATIENCE_S)


@contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    with ExitStack() as stack:
        for process in processes:
            process.suspend()
            stack.callback(process.resume)
        yield


def test_a_decode_worker_that_is_killed_under_streams_changes_no_token(
    server: Serving, expected: dict[str, Stream]
) -> None:
    with healing(server):
        streams = start_all(server, expected, copies=2)
        (_, last) = streams[-1]
        last.wait_for(20)
        serving_worker(last, "decode").kill()
        check_all(streams, expected)
        receipts = [stream.receipt for _, stream in streams]
        assert any("other_decode" in receipt["fallbacks"] for receipt in receipts)
        assert all(receipt["retries"] == len(receipt["attempts"]) - 1 for receipt in receipts)
        assert "baton_fallbacks_total" in server.get("/metrics").text


def test_streams_that_outlast_the_grace_of_a_worker_that_is_asked_to_leave_go_on_elsewhere(
    server: Serving, expected: dict[str, Stream]
) -> None:
    with healing(server):
        long = {kind: start(server, 7, **KINDS[kind], max_tokens=400).finish() for kind in ("greedy", "seeded")}
        streams = start_all(server, long, copies=4)
        (_, last) = streams[-1]
        last.wait_for(5)
        leaving = serving_worker(last, "decode")
        name = next(worker["id"] for worker in server.workers() if worker["pid"] == leaving.pid)
        num_lines = len(server.lines)
        leaving.terminate()
        eventually_sync(lambda: not psutil.pid_exists(leaving.pid), timeout_s=PATIENCE_S, what="its end")
        check_all(streams, long)
        assert any(stream.receipt["retries"] for _, stream in streams)
        told = server.lines[num_lines:]
        assert any("drain timed out" in line for line in told)
        assert any(f"{name} ended with status 0" in line for line in told)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_that_is_stopped_and_woken_changes_no_token(
    server: Serving, expected: dict[str, Stream], role: str
) -> None:
    """The streams end while it sleeps; on waking it serves nothing of what it had, and then it serves again."""
    with healing(server):
        (first, *_) = workers(server, role)
        streams = start_all(server, expected, copies=2)
        if role == "decode":
            (_, started) = streams[0]
            started.wait_for(5)
            first = serving_worker(started, role)
        with stopped(first):
            more = start_all(server, expected)
            check_all(streams + more, expected)
        eventually_sync(lambda: whole(server), timeout_s=PATIENCE_S, what="its return")
        check_all(start_all(server, expected), expected)


def test_without_prefill_workers_decode_workers_prefill_and_ready_says_so(
    server: Serving, expected: dict[str, Stream]
) -> None:
    with healing(server):
        pool = workers(server, "prefill")
        streams = start_all(server, expected)
        with stopped(*pool):
            check_all(streams, expected)
            eventually_sync(
                lambda: "degraded" in server.get("/ready").text, timeout_s=PATIENCE_S, what="the degraded flag"
            )
            assert server.get("/ready").status_code == 200
            more = start_all(server, expected)
            check_all(more, expected)
            assert {stream.receipt["decision"]["mode"] for _, stream in more} == {"local"}
        # Back, and used again.
        eventually_sync(lambda: "reason" not in server.get("/ready").json(), timeout_s=PATIENCE_S)
        assert start(server, 6).finish().receipt["decision"]["mode"] == "remote"


def test_without_decode_workers_requests_wait_for_one(server: Serving, expected: dict[str, Stream]) -> None:
    with healing(server):
        pool = workers(server, "decode")
        streams = start_all(server, expected)
        streams[0][1].wait_for(5)
        with stopped(*pool):
            eventually_sync(lambda: not is_ready(server), timeout_s=PATIENCE_S, what="the gateway's noticing")
            late = [("greedy", Stream(server, expected["greedy"].body))]
            eventually_sync(
                lambda: any(
                    line.startswith("baton_queued_requests") and float(line.split()[-1]) >= len(streams)
                    for line in server.get("/metrics").text.splitlines()
                ),
                timeout_s=PATIENCE_S,
                what="queued requests",
            )
        check_all(streams + late, expected)
        assert "queued" in late[0][1].receipt["fallbacks"]


def test_a_gateway_that_stops_loses_its_requests_on_the_workers_and_goes_on_when_it_wakes(
    server: Serving, expected: dict[str, Stream]
) -> None:
    with healing(server):
        gateway = next(child for child in server.children() if "gateway" in child.cmdline())
        (decode, *_) = workers(server, "decode")
        streams = start_all(server, expected)
        streams[0][1].wait_for(5)
        connections = len(decode.net_connections("tcp"))
        with stopped(gateway):
            eventually_sync(lambda: len(decode.net_connections("tcp")) <= connections, timeout_s=PATIENCE_S)
        check_all(streams, expected)


def test_a_gateway_that_is_killed_leaves_nothing_on_the_workers(server: Serving, expected: dict[str, Stream]) -> None:
    with healing(server):
        gateway = next(child for child in server.children() if "gateway" in child.cmdline())
        streams = start_all(server, expected)
        streams[0][1].wait_for(5)
        gateway.send_signal(signal.SIGKILL)
        gateway.wait(PATIENCE_S)
        eventually_sync(lambda: is_ready(server), timeout_s=PATIENCE_S, what="a new gateway")
        check_all(start_all(server, expected), expected)


def test_a_session_is_over_when_the_worker_that_slept_has_heard_it(server: Serving) -> None:
    def delete() -> httpx.Response:
        return httpx.delete(f"{server.url}/v1/sessions/long", timeout=PATIENCE_S)

    with healing(server):
        start(server, 8, max_tokens=20, session_id="long", session_ttl_s=3600).finish()
        eventually_sync(lambda: server.get("/v1/sessions/long").status_code == 200, timeout_s=PATIENCE_S)
        keeper = server.get("/v1/sessions/long").json()["workers"][0]["id"]
        pid = next(worker["pid"] for worker in server.workers() if worker["id"] == keeper)
        with stopped(psutil.Process(pid)):
            refused = delete()
            assert (refused.status_code, refused.headers.get("retry-after")) == (503, "1"), refused.text
        answers: list[int] = []

        def has_ended() -> bool:
            answers.append(delete().status_code)
            return answers[-1] != 503

        eventually_sync(has_ended, timeout_s=PATIENCE_S, what="its end")
        assert answers[-1] == 204
        assert delete().status_code == 404
        assert server.get("/v1/sessions/long").status_code == 404
