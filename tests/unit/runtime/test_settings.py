"""Options: order of the sources, every problem at once, and each named by where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.services.runtime.settings import GatewaySettings, ServeSettings, Settings, WorkerSettings
from baton.services.runtime.settings_loader import (
    EXIT_BAD_CONFIGURATION,
    PROBLEM_FILE_VARIABLE,
    SettingsError,
    load_settings,
    report_problems,
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("BATON_")]:
        monkeypatch.delenv(name)


def problems_of(cls: type[Settings], flags: dict[str, Any], config: Path | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(cls, flags, config)
    return list(caught.value.problems)


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "baton.yaml"
    config.write_text("port: 1001\ngrpc-port: 1002\nmax_num_seqs: 1003\n")
    monkeypatch.setenv("BATON_PORT", "2001")
    monkeypatch.setenv("BATON_GRPC_PORT", "2002")
    settings = load_settings(ServeSettings, {"port": "3001"}, config)
    assert (settings.port, settings.grpc_port, settings.max_num_seqs, settings.block_size) == (3001, 2002, 1003, 16)


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_PORT", "")
    assert load_settings(ServeSettings, {}).port == 8000


def test_all_problems_are_reported_at_once_one_line_each() -> None:
    flags = {
        "port": "abc",
        "block_size": "12",
        "kv_cache_memory": "-1GiB",
        "prefill": "0",
        "transport": "pigeon",
        "dtype": "int8",
        "max_num_seqs": "1.5",
        "host": "0.0.0.0",
    }
    problems = problems_of(ServeSettings, flags)
    assert len(problems) == len(flags)
    for name, value in flags.items():
        (line,) = [problem for problem in problems if problem.startswith(f"--{name.replace('_', '-')}:")]
        assert value in line, f"{line!r} does not show the value"
        assert "\n" not in line


@pytest.mark.parametrize(
    ("cls", "flags", "option", "words"),
    [
        (ServeSettings, {"port": "8100", "grpc_port": "8100"}, "--grpc-port", "differ from --port"),
        (ServeSettings, {"kv_cache_memory": "0"}, "--kv-cache-memory", "above 0"),
        (ServeSettings, {"kv_cache_memory": "1 parsec"}, "--kv-cache-memory", "unit"),
        (ServeSettings, {"host": "192.168.1.7"}, "--host", "--allow-insecure-bind"),
        (ServeSettings, {"api_key_file": "/no/such/file"}, "--api-key-file", "No such file"),
        (GatewaySettings, {"worker": ["10.0.0.1:9000", "10.0.0.2"]}, "--worker", "host:port"),
        (GatewaySettings, {"nats_url": "http://host"}, "--nats-url", "nats://"),
        (GatewaySettings, {"cluster": "a.b"}, "--cluster", "[a-z0-9-]"),
        (WorkerSettings, {"role": "decode", "worker_id": "Worker 1"}, "--worker-id", "[a-z0-9-]"),
        (WorkerSettings, {"role": "decode", "port": "9000", "kv_port": "9000"}, "--kv-port", "differ from --port"),
        (
            WorkerSettings,
            {"role": "decode", "host": "0.0.0.0", "allow_insecure_bind": True},
            "--advertise-host",
            "wildcard",
        ),
    ],
)
def test_a_problem_names_the_option_and_the_way_out(
    cls: type[Settings], flags: dict[str, Any], option: str, words: str
) -> None:
    (problem,) = problems_of(cls, flags)
    assert problem.startswith(f"{option}: ")
    assert words in problem


def test_problems_name_the_variable_or_the_file_that_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "baton.yaml"
    config.write_text("decode: many\nprefil: 2\n")
    monkeypatch.setenv("BATON_PORT", "70000")
    problems = problems_of(ServeSettings, {}, config)
    assert [problem.split(": ")[0] for problem in problems] == ["BATON_PORT", str(config), str(config)]
    assert any("prefil: no such option (did you mean prefill?)" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n- b\n", "name: value"), ("a: [1, 2\n", "not YAML"), (None, "No such file")]
)
def test_an_unusable_file_is_one_problem(tmp_path: Path, text: str | None, words: str) -> None:
    config = tmp_path / "baton.yaml"
    if text is not None:
        config.write_text(text)
    (problem,) = problems_of(ServeSettings, {}, config)
    assert words in problem


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_API_KEY", "sesame")
    assert "sesame" not in repr(load_settings(ServeSettings, {}))
    (problem,) = problems_of(ServeSettings, {"api_key": [b"\xffsesame", {"sesame": 1}]})[:1]
    assert "sesame" not in problem


def test_keys_come_from_flags_variables_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("three\n")
    other.write_text("four\n")
    assert not load_settings(GatewaySettings, {}).needs_key
    monkeypatch.setenv("BATON_API_KEY", "one, two")
    settings = load_settings(GatewaySettings, {"api_key_file": [str(one), str(other)]})
    assert [key.get_secret_value() for key in settings.api_key] == ["one", "two"]
    assert settings.api_key_file == [one, other]
    assert settings.needs_key
    monkeypatch.delenv("BATON_API_KEY")
    assert load_settings(GatewaySettings, {"api_key_file": str(one)}).needs_key
    assert load_settings(GatewaySettings, {"tenants_file": str(one)}).needs_key
    problems = problems_of(
        GatewaySettings, {"api_key_file": [str(tmp_path / "gone")], "tenants_file": str(tmp_path / "no")}
    )
    assert [problem.split(":")[0] for problem in problems] == ["--api-key-file", "--tenants-file"]
    assert all("cannot read" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("1GiB", 1 << 30), ("512 MiB", 512 << 20), ("1.5gb", 1_500_000_000), (4096, 4096)]
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert load_settings(ServeSettings, {"kv_cache_memory": text}).kv_cache_memory == num_bytes


@pytest.mark.parametrize("url", ["", "none", "None"])
def test_nats_can_be_left_out(url: str) -> None:
    assert load_settings(GatewaySettings, {"nats_url": url}).nats_url is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert load_settings(ServeSettings, {"host": host}).host == host


def test_block_key_file_must_hold_a_usable_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"x" * 15)
    (problem,) = problems_of(WorkerSettings, {"role": "prefill", "block_key_file": str(key)})
    assert "16 to 64 bytes, it holds 15" in problem
    key.write_bytes(b"x" * 32)
    assert load_settings(WorkerSettings, {"role": "prefill", "block_key_file": str(key)}).block_key_file == key


def test_a_worker_is_reached_by_its_advertised_host() -> None:
    flags = {"role": "decode", "host": "0.0.0.0", "allow_insecure_bind": True, "advertise_host": "10.1.2.3"}
    assert load_settings(WorkerSettings, flags).public_host == "10.1.2.3"
    assert load_settings(WorkerSettings, {"role": "decode"}).public_host == "127.0.0.1"


def test_reporting_prints_lines_and_gives_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_problems("baton serve", SettingsError(["--a: x", "--b: y\n z"])) == EXIT_BAD_CONFIGURATION == 2
    assert capsys.readouterr().err == "baton serve: --a: x\nbaton serve: --b: y z\n"


def test_a_supervised_process_reports_to_its_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PROBLEM_FILE_VARIABLE, str(tmp_path / "problems"))
    report_problems("baton decode", SettingsError(["--a: x"]))
    assert (tmp_path / "problems").read_text() == "baton decode: --a: x\n"
    assert capsys.readouterr().err == ""
