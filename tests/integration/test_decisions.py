"""What a running installation tells of its decisions, and what ``baton profile`` measures of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.oracle import make_subject
from helpers.serving import Serving, serving
from helpers.waiting import eventually_sync

from baton.services.core.cost_learning import CostBook
from baton.services.gateway.experience import read_profiles
from baton.services.local.profile import Grid, run_profile

OPTIONS = ("--kv-cache-memory", "32MiB", "--max-num-seqs", "32", "--dtype", "float32", "--served-model-name", "tiny")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    subject = make_subject("qwen3", tmp_path_factory.mktemp("model"))
    with serving("--model", str(subject.path), *OPTIONS) as running:
        yield running


def test_what_was_decided_is_compared_with_what_it_took(server: Serving) -> None:
    body = {"model": "tiny", "prompt": list(range(5, 45)), "max_tokens": 4, "ignore_eos": True}
    answer = server.post("/v1/completions", body).json()
    decision = server.get(f"/v1/requests/{answer['id']}").json()["decision"]
    assert (decision["mode"], decision["other_way"]["mode"]) == ("remote", "local")
    assert decision["regret_ms"] >= 0
    page = server.get("/v1/decisions").json()
    assert page["placement"] == "remote"
    assert page["threshold_tokens"] is None or page["threshold_tokens"] >= 1
    learned = {worker["id"]: worker for worker in page["workers"]}
    assert learned["prefill-0"]["prefill_ms"]
    assert any(row["mode"] == "remote" and row["compared"] for row in page["data"])
    assert "baton_decisions_compared_total" in server.get("/metrics").text

    def metric_and_page_agree() -> bool:
        """Loads that workers report change both, now and then between the two."""
        lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith("baton_handover_")]
        tokens = server.get("/v1/decisions").json()["threshold_tokens"]
        return [float(line.split()[1]) for line in lines] == [math.inf if tokens is None else tokens]

    eventually_sync(metric_and_page_agree, timeout_s=60, what="the same threshold in both")


def test_a_profile_of_the_running_workers_is_what_a_gateway_starts_from(
    server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    grid = Grid(lengths=(16, 32, 64, 1 << 30), batches=(1, 2, 4), contexts=(16, 48), repeats=1)
    assert run_profile(server.url, None, path, grid) == 0
    content = json.loads(path.read_text())
    assert [tokens for tokens, _ in content["pools"]["prefill"]["prefill"]] == [16, 32, 64]
    assert content["transfer"]["bytes_per_s"] > 0
    assert content["pools"]["decode"]["decode"]["base_s"] >= 0
    for part in (
        content["pools"]["prefill"]["prefill_held_out_error"],
        content["pools"]["decode"]["decode_held_out_error"],
    ):
        assert part >= 0
    assert "held-out error" in capsys.readouterr().out
    profiles = read_profiles(path)
    book = CostBook(profiles)
    cost = book.cost("new", "prefill", prefill_s_per_token=0.0, decode_step_s=0.0, now=0.0)
    assert cost.prefill_s(64) == pytest.approx(content["pools"]["prefill"]["prefill"][2][1])
    assert run_profile("http://127.0.0.1:9", None, path, grid) == 1
