"""A receipt as people read it: bars that sum to the time to first token, the choice, what cost the service level."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from baton.services.local import explain as module
from baton.services.local.explain import bars, choice, render, verdict
from baton.services.local.gateway_client import Answer, GatewayClient

RUNNER_UP = {"mode": "local", "prefill": None, "decode": "decode-1", "predicted_ttft_ms": 90.0}
DECISION = {
    "mode": "remote", "prefill": "prefill-0", "decode": "decode-0", "predicted_ttft_ms": 80.0, "runner_up": RUNNER_UP,
    "reason": "cheapest of 2 pairs",
}  # fmt: skip
RECEIPT: dict[str, Any] = {
    "id": "r-1",
    "model": "m",
    "outcome": "stop",
    "slo": {"class": "interactive", "ttft_ms": 60.0, "tpot_ms": 50.0, "met": False},
    "decision": DECISION,
    "phases_ms": {
        "admission": 1.0, "tokenize": 2.0, "queue": 60.0, "prefill": 30.0, "transfer": 4.0, "decode_wait": 0.0,
        "first_token": 3.0,
    },
    "ttft_ms": 100.0, "tpot_ms": 20.0, "e2e_ms": 500.0, "prompt_tokens": 1234, "cached_tokens": 16, "completion_tokens": 21,
    "transfer": {
        "path": "tcp", "blocks": 70, "blocks_skipped": 7, "bytes": 1000000, "gb_per_s": 0.5, "checksum": "xxh3_64 ok",
        "fallbacks": ["shm"], "duration_ms": 12.0, "commit_ms": 1.0, "reserve_wait_ms": 0.5,
    },
    "fetch": {"from": "decode-1", "path": "shm", "blocks": 5, "bytes": 500, "duration_ms": 2.0, "error": None},
    "retries": 1,
    "fallbacks": ["other_decode"],
    "attempts": [
        {"attempt": 1, "mode": "remote", "prefill": "prefill-0", "decode": "decode-1", "outcome": "peer_lost"},
        {"attempt": 2, "mode": "remote", "prefill": "prefill-0", "decode": "decode-0", "outcome": "done"},
    ],
}  # fmt: skip


def shown(receipt: dict[str, Any], *, is_plain: bool = True) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(receipt, is_plain=is_plain))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [7, 48, 100])
def test_bars_follow_each_other_without_gap_and_fill_the_time_to_first_token(width: int) -> None:
    end = 0
    for _, first, columns in bars(RECEIPT["phases_ms"], 100.0, width):
        assert first == end
        assert columns >= 0
        end = first + columns
    assert end == width


def test_a_bar_is_as_long_as_its_phases_share() -> None:
    assert {name: columns for name, _, columns in bars(RECEIPT["phases_ms"], 100.0, 100)} == {
        "admission": 1, "tokenize": 2, "queue": 60, "prefill": 30, "transfer": 4, "decode_wait": 0, "first_token": 3,
    }  # fmt: skip


def test_no_time_at_all_has_no_bars() -> None:
    assert bars({"queue": 0.0}, 0.0, 10) == [("queue", 0, 0)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {},
            "interactive (TTFT 60 ms, TPOT 50 ms): missed; TTFT was 40.0 ms over, and queue took 60% of it: prompts before",
        ),
        ({"slo": RECEIPT["slo"] | {"met": True}}, "interactive (TTFT 60 ms, TPOT 50 ms): met"),
        ({"ttft_ms": 50.0, "tpot_ms": 75.0}, "missed; TPOT was 25.0 ms over"),
        ({"outcome": "abort"}, "missed, since the request ended with abort"),
        ({"outcome": "running"}, "not over yet"),
        ({"slo": {"class": "batch", "ttft_ms": None, "tpot_ms": None, "met": True}}, "batch (no targets): met"),
    ],
)
def test_the_verdict_names_what_was_missed_and_the_phase_that_cost_it(change: dict[str, Any], words: str) -> None:
    assert words in verdict(RECEIPT | change)


@pytest.mark.parametrize(
    ("predicted_ms", "words"),
    [(90.0, "decode-1 (local), predicted 90.0 ms: 10.0 ms slower"), (70.0, "10.0 ms faster, but not chosen: cheapest of 2"),
     (80.0, "no faster")],
)  # fmt: skip
def test_the_runner_up_is_compared_with_the_choice(predicted_ms: float, words: str) -> None:
    assert words in choice(DECISION | {"runner_up": RUNNER_UP | {"predicted_ttft_ms": predicted_ms}})
    assert choice(DECISION | {"runner_up": None}) == "there was no other"


def test_everything_in_the_receipt_is_told() -> None:
    text = shown(RECEIPT)
    for words in (
        "request    r-1  (m), stop",
        "placement  prefill-0 -> decode-0 (remote): cheapest of 2 pairs",
        "queue         60.00 ms   60%",
        "TTFT         100.00 ms  100%",
        "tokens     1,234 prompt, 16 of them cached; 21 completion",
        "prediction TTFT 80.0 ms: 20.0 ms later",
        "70 blocks, 1,000,000 bytes over tcp in 12.0 ms (0.5 GB/s), xxh3_64 ok; 7 were there already",
        "other transports first: shm",
        "fetched    from decode-1: 5 blocks",
        "attempt 1  prefill-0 -> decode-1 (remote): peer_lost",
        "attempt 2  prefill-0 -> decode-0 (remote): done",
        "fallbacks  other_decode",
    ):
        assert words in text
    assert text.isascii()
    assert "\u2588" in shown(RECEIPT, is_plain=False)


def test_a_refused_request_and_several_choices_are_shown_as_well() -> None:
    nothing = dict.fromkeys(("decision", "ttft_ms", "tpot_ms", "e2e_ms", "transfer", "fetch"))
    refused = RECEIPT | nothing | {"outcome": "refused", "attempts": [], "retries": 0, "fallbacks": []}
    assert "placement  none" in shown(refused)
    choices = [{"request_id": "r-1.1", "outcome": "stop", "completion_tokens": 3, "cached_tokens": 0, "ttft_ms": 9.0}]
    assert "r-1.1" in shown(RECEIPT | {"choices": choices})


def test_the_command_asks_by_id_and_passes_on_json_and_refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    answers = [Answer(200, RECEIPT), Answer(200, RECEIPT), Answer(404, {"error": {"message": "There is no receipt."}})]

    def get(_: GatewayClient, path: str) -> Answer:
        asked.append(path)
        return answers.pop(0)

    monkeypatch.setattr(GatewayClient, "get", get)
    monkeypatch.setenv("COLUMNS", "160")
    url = "http://127.0.0.1:1"
    assert module.explain(url, None, "a/b", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == RECEIPT
    assert module.explain(url, None, "r-1", as_json=False) == 0
    assert "SLO        interactive" in capsys.readouterr().out
    assert module.explain(url, None, "nope", as_json=False) == 1
    assert capsys.readouterr().err == f"baton explain: {url} answered 404: There is no receipt.\n"
    assert asked == ["/v1/requests/a%2Fb", "/v1/requests/r-1", "/v1/requests/nope"]
