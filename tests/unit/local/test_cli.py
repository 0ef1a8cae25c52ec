"""The baton command: bad options are one line each and status 2, within two seconds, with nothing imported for nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from baton.services.local.options import flags_for
from baton.services.runtime.net import bind_listener
from baton.services.runtime.settings import ServeSettings, WorkerSettings
from baton.services.runtime.settings_loader import load_settings


def baton(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return subprocess.run(
        [sys.executable, "-m", "baton.services.local", *arguments],
        env={**environment, **variables, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_problem_of_flags_variables_file_and_typing_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("decode: 0\nmodell: x\n")
    options = ["--port", "abc", "--porrt=1", "--kv-cache-memory", "-1GiB", "stray", "--config", str(config)]
    run = baton("serve", *options, BATON_BLOCK_SIZE="12")
    assert run.returncode == 2
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert all(line.startswith("baton serve: ") for line in lines), run.stderr
    for words in (
        "--porrt: no such option (did you mean --port?)",
        "stray: unexpected argument",
        "--port: input should be a valid integer",
        "--kv-cache-memory: must be above 0",
        "BATON_BLOCK_SIZE: must be a power of two",
        "decode: input should be greater than or equal to 1",
        "modell: no such option (did you mean model?)",
    ):
        assert sum(words in line for line in lines) == 1, f"{words!r} not once in {run.stderr}"
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["srve"], "No such command 'srve'"),
        (["serve", "--port"], "requires an argument"),
        (["serve", "--model", "/no/such/folder"], "baton serve: --model: no such folder: /no/such/folder"),
        (["gateway", "--host", "0.0.0.0"], "baton gateway: --host: 0.0.0.0 can be reached from other machines"),
        (["prefill", "--role", "decode"], "baton prefill: --role: no such option"),
        (["status", "--url", "localhost"], "baton status: --url: must look like http://host:8000"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], words: str) -> None:
    run = baton(*arguments)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert words in run.stderr


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_ports_in_use_are_all_named(command: str) -> None:
    with bind_listener("127.0.0.1", 0) as one, bind_listener("127.0.0.1", 0) as two:
        ports = [str(listener.getsockname()[1]) for listener in (one, two)]
        run = baton(command, "--port", ports[0], "--grpc-port", ports[1])
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        f"baton {command}: --port: cannot listen on 127.0.0.1:{ports[0]}: the port is in use",
        f"baton {command}: --grpc-port: cannot listen on 127.0.0.1:{ports[1]}: the port is in use",
    ]


def test_status_without_a_gateway_says_so() -> None:
    run = baton("status", "--url", "http://127.0.0.1:1")
    assert run.returncode == 1
    assert re.fullmatch(r"baton status: no gateway answers at http://127\.0\.0\.1:1: .*\n", run.stderr)


def test_version_and_help() -> None:
    assert re.fullmatch(r"baton \d+\.\d+\.\d+\n", baton("--version").stdout)
    page = baton("serve", "--help").stdout
    for name in ServeSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in page
    assert "--role" not in baton("decode", "--help").stdout


def test_the_command_itself_imports_nothing_heavy() -> None:
    code = "import sys; import baton.services.local.__main__; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "fastapi", "grpc", "nats", "numpy"} & set(modules)


def test_flags_for_a_child_give_it_the_same_settings() -> None:
    serve = load_settings(
        ServeSettings,
        {"kv_cache_memory": "64MiB", "prefix_caching": "false", "api_key": ["secret"], "dtype": "float32"},
    )
    flags = flags_for(WorkerSettings, serve, role="decode", port=0)
    assert "secret" not in flags
    assert "--no-prefix-caching" in flags
    given: dict[str, object] = {}
    rest = iter(flags)
    for flag in rest:
        name = flag[2:].replace("-", "_")
        if flag.startswith("--no-"):
            given[name.removeprefix("no_")] = False
        elif isinstance(getattr(serve, name, None), bool):
            given[name] = True
        else:
            given[name] = next(rest)
    worker = load_settings(WorkerSettings, given)
    shared = set(WorkerSettings.model_fields) & set(ServeSettings.model_fields) - {"port"}
    assert {name: getattr(worker, name) for name in shared} == {name: getattr(serve, name) for name in shared}
