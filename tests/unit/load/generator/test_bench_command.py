"""``baton bench`` as a command: its options, its files, its statuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.scripted_openai import ScriptedServer, scripted_openai
from helpers.waiting import eventually_sync

from baton.load.generator.arrivals import Arrival
from baton.load.generator.command import EXIT_INTERRUPTED, make_workload, run_bench
from baton.load.generator.self_check import self_check
from baton.load.generator.settings import BenchSettings
from baton.services.local.late_commands import LATE_COMMANDS
from baton.services.runtime.client_tls import CA_VARIABLE
from baton.services.runtime.settings_loader import SettingsError, load_settings

# What readers of vLLM's JSON look for.
VLLM_KEYS = {
    *(
        "date",
        "endpoint_type",
        "backend",
        "label",
        "model_id",
        "tokenizer_id",
        "num_prompts",
        "request_rate",
        "burstiness",
    ),
    *("max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests"),
    *(f"{figure}_{name}_ms" for figure in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
}
VLLM_DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "errors"}


def settings(**options: Any) -> BenchSettings:
    return load_settings(BenchSettings, options)


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return subprocess.run(
        [sys.executable, "-m", "baton.services.local", "bench", *options],
        env={**environment, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run(server: ScriptedServer, tmp_path: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a short run in this process."""
    output = tmp_path / "out" / "result.json"
    given = {"url": server.url, "arrival": "all-at-once", "num_prompts": 4, "num_warmups": 1, "output": output}
    status = run_bench(settings(**given | options))
    return status, json.loads(output.read_text()) if output.exists() else {}


def test_bad_options_are_all_named_at_once_with_status_2() -> None:
    run = bench(
        *(
            "--url",
            "localhost",
            "--burstiness",
            "0",
            "--goodput",
            "ttft=5",
            "--trace",
            "/no/such",
            "--extra-body",
            "[1]",
        ),
        *("--prompt", "token-ids", "--header", "no colon", "--request-rate", "-1", "--what"),
    )
    assert run.returncode == 2
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert all(line.startswith("baton bench: ") for line in lines), run.stderr
    for words in (
        "--url: must look like http://host:8000, got 'localhost'",
        "--burstiness: input should be greater than 0",
        "--goodput: must be ttft:MS, tpot:MS or e2el:MS, got 'ttft=5'",
        "--trace: no such file: /no/such",
        "--extra-body: must be a JSON object",
        "--prompt: token ids need --endpoint completions",
        "--header: must be NAME:VALUE, got 'no colon'",
        "--request-rate: input should be greater than 0",
        "--what: no such option",
    ):
        assert sum(words in line for line in lines) == 1, f"{words!r} not once in {run.stderr}"
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arrival": "trace"}, "trace needs --trace FILE"),
        ({"arrival": "constant", "burstiness": "2"}, "belongs to --arrival gamma, not to constant"),
        ({"send_slo": "true", "goodput": "e2el:5"}, "needs --goodput with ttft or tpot"),
        ({"metric_percentiles": "99,101"}, "between 0 and 100, got 101"),
        ({"trace": __file__, "turns": "2"}, "single turns"),
        ({"extra_body": "{"}, "not JSON"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings(**options)


def test_the_arrival_follows_from_the_other_options() -> None:
    assert settings().chosen_arrival is Arrival.POISSON
    assert settings(burstiness="0.5").chosen_arrival is Arrival.GAMMA
    assert settings(trace=__file__).chosen_arrival is Arrival.TRACE
    assert settings(trace=__file__, arrival="constant").chosen_arrival is Arrival.CONSTANT


def test_targets_have_vllms_syntax() -> None:
    chosen = settings(goodput="ttft:500 tpot:50.5,e2el:9")
    assert (chosen.slo().ttft_s, chosen.slo().tpot_s, chosen.slo().e2el_s) == (0.5, pytest.approx(0.0505), 0.009)


def test_a_trace_is_scaled_limited_and_cut(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000 * at, "input_length": 1024, "output_length": 320, "hash_ids": [0, at]} for at in range(10)
    ]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    work = make_workload(settings(trace=trace, num_prompts=8, time_scale=0.1, length_scale=1 / 32, duration_s=0.5))
    assert [one.at_s for one in work] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert (work[0].turns[0].input_len, work[0].turns[0].output_len) == (32, 10)
    assert work[1].turns[0].parts[0] == work[2].turns[0].parts[0]
    poisson = make_workload(settings(trace=trace, arrival="poisson", request_rate=5, max_input_len=600))
    assert len(poisson) == 10
    assert poisson[0].at_s > 0
    assert poisson[0].turns[0].input_len == 600
    trace.write_text("{}")
    with pytest.raises(SettingsError, match=r"--trace: .*trace.jsonl: line 1: there is no 'timestamp'"):
        make_workload(settings(trace=trace))


def test_equal_seeds_send_equal_bodies_and_other_seeds_others(tmp_path: Path) -> None:
    sent = []
    for seed in (1, 1, 2):
        with scripted_openai(ScriptedServer()) as server:
            run(server, tmp_path, seed=seed, max_concurrency=1, num_warmups=0)
            sent.append([body["messages"] for body in server.bodies])
    assert sent[0] == sent[1] != sent[2]
    assert len({str(messages) for messages in sent[0]}) == 4


def test_the_json_has_vllms_keys_and_the_records_every_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.jsonl"
    with scripted_openai(ScriptedServer()) as server:
        options = {"goodput": "ttft:60000", "records": records, "save_detailed": True, "api_key": "sesame"}
        status, content = run(server, tmp_path, send_slo=True, **options)
        assert all(headers["authorization"] == "Bearer sesame" for headers in server.headers)
        assert all(headers["x-slo-ttft-ms"] == "60000" for headers in server.headers)
        assert len(server.bodies) == 5  # with the warm-up
    assert status == 0
    assert content.keys() >= VLLM_KEYS | VLLM_DETAILS
    assert (content["completed"], content["failed"], content["num_prompts"]) == (4, 0, 4)
    assert (content["total_input_tokens"], content["total_output_tokens"], content["total_cached_tokens"]) == (
        80,
        16,
        64,
    )
    assert content["request_goodput"] == pytest.approx(content["request_throughput"])
    assert content["request_rate"] == "inf"
    assert len(content["ttfts"]) == len(content["itls"]) == 4
    assert "sesame" not in json.dumps(content)
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["completed"] * 4
    assert all(line["ttft_s"] > 0 and line["missed"] is None for line in lines)
    shown = capsys.readouterr().out
    for words in ("scripted at http://127.0.0.1", "goodput", "100.0%", "TTFT", "TPOT", "sent late"):
        assert words in shown


def test_refusals_lower_goodput_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_openai(ScriptedServer(script=["ok", "refuse", "ok", "refuse"])) as server:
        options = {"num_warmups": 0, "goodput": "ttft:60000", "min_attainment": 0.6}
        status, content = run(server, tmp_path, **options)
    assert status == 1
    assert (content["completed"], content["failed"], content["refused"]) == (2, 2, 2)
    assert content["slo_attainment"] == 0.5
    assert content["errors_by_kind"] == {"429: scripted to refuse": 2}
    errors = capsys.readouterr().err
    assert "2 x 429: scripted to refuse" in errors
    assert "50.0% of the requests were good, --min-attainment asks for 60.0%" in errors


def test_a_server_that_fails_every_request_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_openai(ScriptedServer(script=["fail"])) as server:
        assert run(server, tmp_path, num_warmups=1) == (1, {})
        assert "every warm-up request failed: 500: scripted to fail" in capsys.readouterr().err
        assert run(server, tmp_path, num_warmups=0)[0] == 1
        assert "no request was completed" in capsys.readouterr().err


def test_nobody_there_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench(settings(url="http://127.0.0.1:1")) == 1
    assert re.match(r"baton bench: http://127\.0\.0\.1:1: GET /v1/models: ", capsys.readouterr().err)


def test_ctrl_c_saves_what_there_is_and_says_so(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    with scripted_openai(ScriptedServer(script=["ok", "ok", "silent"])) as server:
        command = [sys.executable, "-m", "baton.services.local", "bench", "--url", server.url, "--output", str(output)]
        options = ["--num-warmups", "0", "--arrival", "constant", "--request-rate", "20", "--num-prompts", "100000"]
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            eventually_sync(lambda: len(server.bodies) >= 4, timeout_s=60, what="four requests")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert re.search(r"interrupted: 2 of 100000 requests had ended; \d+ under way were given up", errors)
    content = json.loads(output.read_text())
    assert (content["is_interrupted"], content["completed"], content["failed"]) == (True, 2, 0)


def test_the_generator_says_what_it_can_drive() -> None:
    check = self_check(rates=(50,), seconds=0.4)[0]
    assert check.failed == 0
    assert check.rate == 50
    assert check.lateness_p99_ms >= check.lateness_p50_ms >= 0
    assert check.cpu_share > 0


def test_the_command_is_found_by_name_and_shown_in_the_help() -> None:
    environment = {**os.environ, "COLUMNS": "160"}
    command = [sys.executable, "-m", "baton.services.local", "--help"]
    page = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert all(re.search(rf"\b{name} ", page) for name in LATE_COMMANDS)


def test_a_ca_file_that_is_none_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CA_VARIABLE, "")  # what the command sets ends with the test
    nothing = tmp_path / "ca.crt"
    nothing.write_text("nothing")
    assert run_bench(settings(url="https://127.0.0.1:1", ca_file=nothing)) == 2
    assert capsys.readouterr().err.startswith(f"baton bench: {nothing} holds no PEM CERTIFICATE")
