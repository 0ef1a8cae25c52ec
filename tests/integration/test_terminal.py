"""One installation seen from a terminal: load, chat, receipts, state, health; and what its logs say, and do not say."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import Serving, serving
from helpers.waiting import eventually_sync

from baton.load.generator.command import run_bench
from baton.load.generator.settings import BenchSettings
from baton.services.local.chat import ChatOptions, chat
from baton.services.local.doctor_gateway import check_gateway
from baton.services.local.explain import explain
from baton.services.local.status import show_status
from baton.services.runtime.settings_loader import load_settings

KEY = "sesame-opens-it"
HEADERS = {"authorization": f"Bearer {KEY}"}
QUESTION = "The code for amber fox is 4821. What is the code for amber fox?"
# Never in a log, at any level: what was asked, what was answered, keys.
SECRETS = ("amber", "4821", "the code for", KEY, "wrong-key-9", "unheard-of-words")


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    options = ("--kv-cache-memory", "32MiB", "--placement", "remote", "--log-level", "debug", "--log-format", "json")
    with serving(*options, "--api-key", KEY) as running:
        yield running


def logged(server: Serving) -> list[dict[str, Any]]:
    """Every structured line so far."""
    return [json.loads(line[line.index("{") :]) for line in list(server.lines) if '"event"' in line]


def test_bench_measures_a_trace_with_shared_prefixes(server: Serving, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 400 * index, "input_length": 3 * 512, "output_length": 256, "hash_ids": [0, 1, 10 + index]}
        for index in range(6)
    ]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    output = tmp_path / "result.json"
    options = {"url": server.url, "api_key": KEY, "trace": trace, "length_scale": 1 / 16, "output": output}
    for endpoint in ("chat", "completions"):
        given = options | {"endpoint": endpoint, "goodput": "ttft:60000", "num_warmups": 1, "seed": len(endpoint)}
        assert run_bench(load_settings(BenchSettings, given)) == 0
        result = json.loads(output.read_text())
        assert (result["completed"], result["failed"], result["slo_attainment"]) == (6, 0, 1.0)
        assert result["total_output_tokens"] == 6 * 16
        assert abs(result["total_input_tokens"] / (6 * 96) - 1) < 0.05
        assert result["total_cached_tokens"] >= 16  # the blocks that all prompts begin with


def test_bench_sends_token_ids_of_exact_length_and_conversations(server: Serving, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = {"url": server.url, "api_key": KEY, "endpoint": "completions", "prompt": "token-ids", "output": output}
    work = {"num_prompts": 2, "turns": 2, "input_len": 40, "output_len": 8, "turn_input_len": 8, "num_warmups": 0}
    given = options | work | {"arrival": "all-at-once", "save_detailed": True}
    assert run_bench(load_settings(BenchSettings, given)) == 0
    result = json.loads(output.read_text())
    assert result["failed"] == 0
    assert sorted(result["input_lens"]) == [40, 40, 56, 56]  # the second turns: prompt, answer and eight more


def test_chat_explain_status_and_doctor_see_the_same_request(
    server: Serving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setenv("COLUMNS", "200")
    assert chat(server.url, KEY, QUESTION, ChatOptions(temperature=0.0)) == 0
    assert "4821" in capsys.readouterr().out
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
    answer = server.post("/v1/chat/completions", body, headers=HEADERS | {"x-request-id": "asked-once"})
    assert "4821" in answer.json()["choices"][0]["message"]["content"]
    for request_id in ("asked-once", answer.json()["id"]):
        assert explain(server.url, KEY, request_id, as_json=False) == 0
        shown = capsys.readouterr().out
        assert "placement  prefill-0 -> decode-0 (remote)" in shown
        assert "####" in shown
    assert show_status(server.url, KEY, as_json=True) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["ready"] is True
    assert sum(state["slo_met"].values()) + sum(state["slo_missed"].values()) >= 2
    assert show_status(server.url, KEY) == 0
    assert "verified" in capsys.readouterr().out
    from baton.services.local.doctor import Level, Questions

    questions = Questions(None, server.url, KEY, "127.0.0.1", server.port, server.grpc_port, 1 << 20)
    levels = {finding.what: finding.level for finding in check_gateway(questions)}
    assert levels["gateway"] is levels["worker decode-0"] is levels["link prefill-0 -> decode-0"] is Level.OK


def test_a_requests_lines_in_gateway_prefill_and_decode_have_its_id(server: Serving) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
    answer = server.post("/v1/chat/completions", body, headers=HEADERS | {"x-request-id": "traced-1"})
    assert answer.status_code == 200

    def services() -> dict[str, set[str]]:
        """Which services logged something about each request id."""
        found: dict[str, set[str]] = {}
        for line in logged(server):
            if "request_id" in line:
                found.setdefault(line["request_id"], set()).add(line["service"])
        return {request_id: names for request_id, names in found.items() if "traced-1" in request_id}

    expected = {"gateway", "prefill", "decode"}
    eventually_sync(lambda: expected in services().values(), timeout_s=30, what=f"lines of all: {services()}")
    assert len(services()) == 1


def test_no_log_line_has_a_prompt_an_answer_or_a_key(server: Serving) -> None:
    question = f"{QUESTION} unheard-of-words"
    messages = [{"role": "user", "content": question}]
    path = "/v1/chat/completions"
    stream = {"messages": messages, "max_tokens": 8, "stream": True}
    assert server.post(path, stream, headers=HEADERS).status_code == 200
    assert server.post("/v1/completions", {"prompt": question, "max_tokens": 4}, headers=HEADERS).status_code == 200
    # Refused at every door: a wrong key, a wrong value, a body that is no JSON, a prompt that is too long.
    refused = [
        server.post(path, {"messages": messages}, headers={"authorization": "Bearer wrong-key-9"}),
        server.post(path, {"messages": messages, "temperature": "unheard-of-words"}, headers=HEADERS),
        server.post(path, {"messages": question}, headers=HEADERS),
        server.post("/v1/completions", {"prompt": question * 2000, "max_tokens": 4}, headers=HEADERS),
    ]
    assert [answer.status_code for answer in refused] == [401, 400, 400, 400]
    server.post("/v1/completions", {"prompt": "the end", "max_tokens": 2}, headers=HEADERS | {"x-request-id": "last-1"})
    eventually_sync(
        lambda: any("last-1" in str(line.get("request_id")) for line in logged(server)),
        timeout_s=30,
        what="the line of the last request",
    )
    assert len(logged(server)) > 20
    for line in [line for line in server.lines if "curl -N" not in line]:  # the banner's example, for people
        for secret in SECRETS:
            assert secret not in line.lower(), line
