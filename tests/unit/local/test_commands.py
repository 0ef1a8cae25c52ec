"""What the commands beside a gateway print, and when they fail."""

from __future__ import annotations

import http.server
import io
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from baton.services.local.blocks import change_role, drain_worker, show_blocks
from baton.services.local.bundled import BUNDLED_MODEL, BUNDLED_MODEL_NAME, with_model
from baton.services.local.demo import DemoFailed, check, make_question, receipt_table
from baton.services.local.gateway_client import GatewayClient, GatewayUnreachable
from baton.services.local.status import render, show_status, take, workers_table
from baton.services.runtime.settings import ServeSettings
from baton.services.runtime.settings_loader import SettingsError, load_settings

WORKER = {
    "id": "decode-0", "role": "decode", "state": "ready", "address": "127.0.0.1:4000", "pid": 77, "queued": 3, "running": 12,
    "kv_blocks": {"total": 4096, "free": 3998, "cached": 60, "request": 30, "transfer": 6, "quarantine": 2}, "overdue": 1,
}  # fmt: skip
LINK = {
    "decode": "decode-0", "state": "verified", "transport": "shm", "rtt_ms": 2.6, "gb_per_s": 0.36, "breaker": "closed",
    "transfers": 7, "failures": 0, "reason": None,
}  # fmt: skip
BAD_LINK = LINK | {"decode": "decode-1", "state": "failed", "breaker": "open", "reason": "no route", "rtt_ms": None}
PREFILL = WORKER | {"id": "prefill-0", "role": "prefill", "links": [LINK, BAD_LINK]}
METRICS = b"""# HELP baton_slo_met_total x
baton_slo_met_total{class="interactive"} 6.0
baton_slo_missed_total{class="interactive",reason="ttft"} 1.0
baton_slo_missed_total{class="interactive",reason="tpot"} 1.0
baton_requests_total{outcome="stop"} 6.0
baton_requests_total{outcome="length"} 4.0
baton_tokens_total{kind="prompt"} 500.0
baton_tokens_total{kind="cached"} 100.0
baton_tokens_total{kind="completion"} 40.0
baton_gateway_requests_in_flight 3.0
baton_queued_requests 2.0
"""
RECEIPT: dict[str, Any] = {
    "id": "chatcmpl-1",
    "outcome": "stop",
    "decision": {"mode": "remote", "prefill": "prefill-0", "decode": "decode-0", "reason": "placement"},
    "phases_ms": {"admission": 0.5, "prefill": 40.25},
    "ttft_ms": 45.0,
    "tpot_ms": None,
    "e2e_ms": 80.0,
    "prompt_tokens": 321,
    "cached_tokens": 16,
    "completion_tokens": 9,
    "transfer": {"path": "shm", "blocks": 21, "bytes": 258048, "checksum": "xxh3_64 ok"},
    "retries": 0,
}


def rendered(thing: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def gateway() -> Iterator[tuple[str, dict[str, tuple[int, bytes]], list[str]]]:
    """A server with canned answers by path, and the requests that it got."""
    answers: dict[str, tuple[int, bytes]] = {}
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers["content-length"] or 0)
            requests.append(
                f"{self.command} {self.path} {self.headers['authorization']} {self.rfile.read(length).decode()}"
            )
            status, content = answers[self.path]
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers, requests
    server.shutdown()
    thread.join()
    server.server_close()


Gateway = tuple[str, dict[str, tuple[int, bytes]], list[str]]


def test_client_sends_key_and_body_and_reads_json(gateway: Gateway) -> None:
    url, answers, requests = gateway
    answers["/a"] = (200, b'{"x": 1}')
    client = GatewayClient.from_url(url, api_key="sesame")
    assert client.get("/a").body == {"x": 1}
    assert client.post("/a", {"y": 2}).status == 200
    assert requests == ["GET /a Bearer sesame ", 'POST /a Bearer sesame {"y": 2}']


def test_client_takes_what_is_no_json_as_no_body(gateway: Gateway) -> None:
    url, answers, _ = gateway
    answers["/a"] = (502, b"<html>")
    answer = GatewayClient.from_url(url).get("/a")
    assert (answer.status, answer.body) == (502, None)


def test_client_says_where_nobody_answers() -> None:
    with pytest.raises(GatewayUnreachable, match=r"127\.0\.0\.1:1: "):
        GatewayClient("127.0.0.1", 1).get("/")


@pytest.mark.parametrize("url", ["ftp://host", "host:80", "http://", "https://"])
def test_client_wants_a_url_of_http(url: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        GatewayClient.from_url(url)


def test_status_shows_every_block_state(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    url, answers, _ = gateway
    answers["/v1/workers"] = (200, json.dumps({"object": "list", "data": [WORKER, PREFILL]}).encode())
    answers["/ready"] = (200, b'{"status": "ready", "reason": "degraded: x"}')
    answers["/metrics"] = (200, METRICS)
    assert show_status(url, None) == 0
    shown = capsys.readouterr().out
    for text in ("decode-0", "ready", "3,998 free", "60 cached", "30 request", "6 transfer", "2 quarantine"):
        assert text in shown
    for text in (
        "gateway: ready (degraded: x)",
        "3 in flight, 2 queued; ended: length 4, stop 6",
        "500 prompt (20% cached)",
    ):
        assert text in shown
    for text in ("verified", "shm", "0.36", "failed, breaker open", "no route"):
        assert text in shown
    for text in ("interactive", "met, %", "by tpot", "75.0", "by ttft"):
        assert text in shown
    assert rendered(workers_table([])).count("worker") == 1


def test_status_for_programs_has_sums_by_class_and_reason(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    url, answers, _ = gateway
    answers["/v1/workers"] = (200, json.dumps({"object": "list", "data": [WORKER]}).encode())
    answers["/ready"] = (
        503,
        b'{"error": {"message": "no decode worker is ready", "type": "x", "param": null, "code": "y"}}',
    )
    answers["/metrics"] = (200, METRICS)
    assert show_status(url, None, as_json=True) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["ready"], state["reason"]) == (False, "no decode worker is ready")
    assert state["slo_met"] == {"interactive": 6.0}
    assert state["slo_missed_by"] == {"ttft": 1.0, "tpot": 1.0}
    assert state["workers"][0]["id"] == "decode-0"


def test_rates_are_differences_of_two_samples(gateway: Gateway) -> None:
    url, answers, _ = gateway
    answers["/v1/workers"] = (200, b'{"object": "list", "data": []}')
    answers["/ready"] = (200, b"{}")
    answers["/metrics"] = (200, METRICS)
    before = take(GatewayClient.from_url(url))
    now = replace(before, at_s=before.at_s + 2.0, metrics={key: value * 3 for key, value in before.metrics.items()})
    assert "lately: 10.0 requests/s, 500 prompt and 40 completion tokens/s" in rendered(render(now, before))
    assert "lately" not in rendered(render(now, None))


def test_status_passes_on_a_refusal(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    url, answers, _ = gateway
    answers["/v1/workers"] = (
        401,
        b'{"error": {"message": "wrong key", "type": "x", "param": null, "code": "invalid_api_key"}}',
    )
    assert show_status(url, "bad") == 1
    assert capsys.readouterr().err == f"baton status: {url} answered 401: wrong key\n"


BLOCK: dict[str, Any] = {
    "block_id": 17, "state": "transfer", "generation": 4, "name": None, "request_id": "cmpl-7", "attempt": 2,
    "peer": "prefill-1/ab12cd34", "phase": "awaiting_kv", "age_s": 31.25, "deadline_in_s": -1.5, "overdue": True,
}  # fmt: skip


def blocks_page(*rows: dict[str, Any], following: int | None = None) -> tuple[int, bytes]:
    return 200, json.dumps({"object": "list", "worker": "decode-0", "data": rows, "next": following}).encode()


def test_blocks_names_request_peer_phase_age_and_deadline_of_every_page_of_every_worker(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    url, answers, _ = gateway
    answers["/v1/workers"] = (200, json.dumps({"object": "list", "data": [WORKER]}).encode())
    page = "/v1/workers/decode-0/blocks?overdue=true&cached=false&limit=1000&first="
    answers[page + "0"] = blocks_page(BLOCK, following=90)
    cached = {"state": "cached", "request_id": None, "attempt": None, "peer": None, "phase": None, "age_s": None}
    answers[page + "90"] = blocks_page(BLOCK | cached | {"block_id": 91, "deadline_in_s": None, "overdue": False})
    assert show_blocks(url, None, worker_id=None, overdue=True, cached=False) == 0
    shown = capsys.readouterr().out
    for text in (
        "decode-0",
        "17",
        "transfer",
        "cmpl-7/2",
        "prefill-1/ab12cd34",
        "awaiting_kv",
        "31.2 s",
        "1.5 s overdue",
    ):
        assert text in shown
    assert "91" in shown
    assert "2 block(s) overdue" in shown


def test_blocks_and_drain_pass_on_a_refusal(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    url, answers, _ = gateway
    body = b'{"error": {"message": "There is no worker.", "type": "x", "param": null, "code": "not_found"}}'
    answers["/v1/workers/x/blocks?overdue=false&cached=false&limit=1000&first=0"] = (404, body)
    answers["/v1/workers/x/drain?timeout_s=5.0"] = (404, body)
    assert show_blocks(url, None, worker_id="x", overdue=False, cached=False) == 1
    assert drain_worker(url, None, "x", 5.0) == 1
    assert capsys.readouterr().err == (
        f"baton blocks: {url} answered 404: There is no worker.\nbaton drain: {url} answered 404: There is no worker.\n"
    )
    assert drain_worker("http://127.0.0.1:1", None, "x", 5.0) == 1
    assert drain_worker("nowhere", None, "x", 5.0) == 2


def test_drain_says_what_was_handed_back(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    url, answers, requests = gateway
    answers["/v1/workers/decode-0/drain?timeout_s=5.0"] = (
        200,
        b'{"id": "decode-0", "state": "drained", "given_up": 2}',
    )
    assert drain_worker(url, "sesame", "decode-0", 5.0) == 0
    assert capsys.readouterr().out == "decode-0 is drained; 2 request(s) were handed back to go on elsewhere\n"
    assert requests == ["POST /v1/workers/decode-0/drain?timeout_s=5.0 Bearer sesame "]


@pytest.mark.parametrize(("state", "word"), [("changed", "now"), ("unchanged", "already")])
def test_role_says_what_the_worker_is(
    gateway: Gateway, capsys: pytest.CaptureFixture[str], state: str, word: str
) -> None:
    url, answers, requests = gateway
    path = "/v1/workers/decode-1/role?role=prefill&timeout_s=5.0"
    answers[path] = (200, json.dumps({"id": "decode-1", "role": "prefill", "state": state}).encode())
    assert change_role(url, "sesame", "decode-1", "prefill", 5.0) == 0
    assert capsys.readouterr().out == f"decode-1 is {word} a prefill worker\n"
    assert requests == [f"POST {path} Bearer sesame "]


def test_demo_question_can_be_answered_from_its_own_text() -> None:
    for seed in range(20):
        question, value = make_question(random.Random(seed))
        key = question.rpartition("code for ")[2].rstrip("?")
        assert f"The code for {key} is {value}." in question


@pytest.mark.parametrize(
    ("text", "change", "words"),
    [
        ("The code is 1.", {}, "should contain 4821"),
        (
            "4821",
            {"decision": {**RECEIPT["decision"], "mode": "local", "prefill": None}},
            "did not pass through both pools",
        ),
        ("4821", {"decision": {**RECEIPT["decision"], "decode": "prefill-0"}}, "did not pass through both pools"),
        ("4821", {"decision": None}, "did not pass through both pools"),
        ("4821", {"transfer": None}, "no KV blocks"),
    ],
)
def test_demo_fails_where_answer_or_path_is_wrong(text: str, change: dict[str, Any], words: str) -> None:
    check("It is 4821.", "4821", RECEIPT)
    with pytest.raises(DemoFailed, match=words):
        check(text, "4821", {**RECEIPT, **change})


def test_receipt_table_shows_path_phases_and_transfer() -> None:
    shown = rendered(receipt_table(RECEIPT))
    for text in (
        "prefill-0 -> decode-0",
        "321 prompt (16 cached)",
        "40.25 ms",
        "21 blocks, 258,048 bytes over shm",
        "xxh3_64 ok",
    ):
        assert text in shown


def test_the_bundled_model_is_the_default_and_folders_give_their_name(tmp_path: Path) -> None:
    bundled = with_model(load_settings(ServeSettings, {}))
    assert (bundled.model, bundled.served_model_name) == (str(BUNDLED_MODEL), BUNDLED_MODEL_NAME)
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert with_model(load_settings(ServeSettings, {"model": str(folder)})).served_model_name == "my-model"
    hub = with_model(load_settings(ServeSettings, {"model": "org/Model-1.5B", "served_model_name": "m"}))
    assert (hub.model, hub.served_model_name) == ("org/Model-1.5B", "m")
    for missing in ("./model", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(SettingsError, match="no such folder"):
            with_model(load_settings(ServeSettings, {"model": missing}))
