"""``baton doctor``: what is wrong is found and comes with a way to mend it; what cannot be found out is not called well."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from baton.services.core.errors import ConfigurationError
from baton.services.local import doctor_machine, private_directory
from baton.services.local.bundled import BUNDLED_MODEL
from baton.services.local.doctor import Finding, Level, Questions, doctor, examine, line
from baton.services.local.doctor_gateway import check_gateway
from baton.services.local.doctor_machine import MACHINE_CHECKS
from baton.services.local.doctor_model import check_model
from baton.services.local.gateway_client import Answer, GatewayClient, GatewayUnreachable
from baton.services.runtime.net import bind_listener, free_port

MIB = 1 << 20


def questions(**change: Any) -> Questions:
    given = {"model": None, "url": "http://127.0.0.1:1", "api_key": None, "host": "127.0.0.1"}
    ports = {"port": free_port("127.0.0.1"), "grpc_port": free_port("127.0.0.1"), "kv_cache_bytes": MIB}
    return Questions(**(given | ports | change))


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_here_everything_that_the_tests_need_is_well() -> None:
    findings = list(examine(questions(), [*MACHINE_CHECKS, check_model, check_gateway]))
    assert [finding for finding in findings if finding.level is Level.FAIL] == []
    assert {"python", "libraries", "device", "nats", "memory", "descriptors", "model", "weights", "tokenizer"} <= {
        finding.what for finding in findings
    }
    assert by_name(iter(findings))["gateway"].found == "none runs at http://127.0.0.1:1"


def test_a_check_that_breaks_is_a_warning_of_its_own() -> None:
    def check_stars(_: Questions) -> Iterator[Finding]:
        yield Finding("sky", Level.OK, "blue")
        raise OSError("clouds")

    assert list(examine(questions(), [check_stars])) == [
        Finding("sky", Level.OK, "blue"),
        Finding("stars", Level.WARN, "could not be looked at: OSError: clouds"),
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failure_is_status_1_and_comes_with_its_mend(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with bind_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert doctor(questions(port=port), as_json=as_json) == 1
    shown = capsys.readouterr().out
    if as_json:
        content = json.loads(shown)
        assert content["ok"] is False
        assert [finding["what"] for finding in content["findings"] if finding["level"] == "fail"] == [f"port {port}"]
    else:
        assert f"FAIL  port {port}: --port: cannot listen on 127.0.0.1:{port}: the port is in use" in shown
        assert "choose another with --port" in shown
        assert ", 1 failed" in shown


def test_all_well_is_status_0_and_a_mend_is_shown_only_where_it_is_needed() -> None:
    assert doctor(questions(), as_json=True) == 0
    assert "mend" not in line(Finding("x", Level.OK, "fine", "mend")).plain
    assert "mend" in line(Finding("x", Level.WARN, "odd", "mend")).plain


def test_a_missing_or_old_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["no-such-library>=1", "rich>=9999", "orjson>=1", "helm; extra == 'dev'"]
    monkeypatch.setattr(doctor_machine.metadata, "requires", lambda _: required)
    (finding,) = doctor_machine.check_libraries(questions())
    assert finding.level is Level.FAIL
    assert finding.found.startswith("no-such-library is missing (>=1); rich ")
    assert finding.found.endswith(" is not >=9999")


def test_no_nats_server_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Path:
        raise ConfigurationError("nats-server is not on PATH")

    monkeypatch.setattr(doctor_machine, "find_nats_server", find)
    (finding,) = doctor_machine.check_nats(questions())
    assert (finding.level, finding.found) == (Level.FAIL, "nats-server is not on PATH")
    monkeypatch.setattr(doctor_machine, "find_nats_server", lambda: Path("/bin/false"))
    (finding,) = doctor_machine.check_nats(questions())
    assert finding.level is Level.FAIL
    assert "does not run" in finding.found


def test_little_shared_memory_and_what_was_left_there_are_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine, "_SHM", tmp_path)
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64 * MIB, MIB, MIB))
    (tmp_path / "torch_123").touch()
    (tmp_path / "somebody-else").touch()
    small, left = doctor_machine.check_shared_memory(questions())
    assert (small.level, small.found) == (Level.WARN, f"{tmp_path} has 1 MiB of 64 MiB free")
    assert (left.level, left.found) == (Level.WARN, f"1 file(s) in {tmp_path}: torch_123")
    monkeypatch.setattr(doctor_machine, "_SHM", tmp_path / "none")
    assert [finding.level for finding in doctor_machine.check_shared_memory(questions())] == [Level.WARN]


def test_directories_of_killed_installations_are_found_and_those_in_use_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_directory.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(private_directory.tempfile, "tempdir", str(tmp_path))
    in_use = private_directory.PrivateDirectory()
    killed = tmp_path / "baton-serve-killed"
    killed.mkdir()
    (killed / "lock").touch()
    an_hour_ago = time.time() - 3600
    for path in (in_use.path, killed):
        os.utime(path, (an_hour_ago, an_hour_ago))
    (finding,) = doctor_machine.check_leftovers(questions())
    assert (finding.level, finding.found) == (Level.WARN, f"1 of killed installations: {killed}")
    assert killed.exists()  # it only looks
    in_use.remove()


@pytest.mark.parametrize(
    ("limit_mib", "level"), [("max", Level.OK), (str(900 * MIB), Level.OK), (str(101 * MIB), Level.FAIL)]
)
def test_memory_is_what_the_container_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_mib: str, level: Level
) -> None:
    for name, text in (
        ("_MEMINFO", f"MemTotal: 9 kB\nMemAvailable: {1024 * 1024} kB\n"),
        ("_CGROUP_MEMORY", limit_mib),
        ("_CGROUP_MEMORY_USED", str(100 * MIB)),
    ):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(doctor_machine, name, tmp_path / name)
    (finding,) = doctor_machine.check_memory(questions(kv_cache_bytes=4 * MIB))
    assert finding.level is level


@pytest.mark.parametrize(("soft", "level"), [(256, Level.FAIL), (2000, Level.WARN), (10_000, Level.OK)])
def test_few_descriptors_are_a_warning_and_too_few_a_failure(
    monkeypatch: pytest.MonkeyPatch, soft: int, level: Level
) -> None:
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (soft, soft))
    assert [finding.level for finding in doctor_machine.check_descriptors(questions())] == [level]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be spoilt."""
    copy = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return copy


def look(folder: Path | str, **change: Any) -> dict[str, Finding]:
    return by_name(check_model(questions(model=str(folder), **change)))


def test_a_good_folder_is_well(folder: Path) -> None:
    assert {finding.level for finding in look(folder).values()} == {Level.OK}


def test_a_cut_file_of_weights_fails_and_the_rest_is_looked_at_as_well(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = look(folder)
    assert found["weights"].level is Level.FAIL
    assert "model.safetensors" in found["weights"].found
    assert found["tokenizer"].level is Level.OK


def test_a_missing_tokenizer_and_a_missing_template_are_told_apart(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content.pop("chat_template", None)
    settings.write_text(json.dumps(content))
    for template in folder.glob("chat_template.*"):
        template.unlink()
    assert look(folder)["chat template"].level is Level.WARN
    (folder / "tokenizer.json").unlink()
    assert look(folder)["tokenizer"].level is Level.FAIL


def test_an_architecture_that_is_not_supported_fails(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    assert "'MambaForCausalLM' is not supported" in look(folder)["model"].found


def test_a_model_that_does_not_fit_fails_and_a_hub_id_is_not_fetched(folder: Path) -> None:
    assert look(folder, kv_cache_bytes=1 << 50)["weights"].level is Level.FAIL
    found = look("some/model")
    assert [(finding.what, finding.level) for finding in found.values()] == [("model", Level.WARN)]


LINK: dict[str, Any] = {
    "decode": "decode-0", "state": "verified", "transport": "shm", "breaker": "closed", "reason": None, "failed_transports": [],
}  # fmt: skip
WORKER: dict[str, Any] = {
    "id": "prefill-0", "role": "prefill", "state": "ready", "problem": None, "address": "a:1", "overdue": 0, "ledger_error": 0,
    "links": [LINK],
}  # fmt: skip


def ask(monkeypatch: pytest.MonkeyPatch, ready: Answer, workers: Answer) -> dict[str, Finding]:
    answers = {"/ready": ready, "/v1/workers": workers}
    monkeypatch.setattr(GatewayClient, "get", lambda _, path: answers[path])
    return by_name(check_gateway(questions()))


def listed(**change: Any) -> Answer:
    return Answer(200, {"data": [WORKER | change]})


READY = Answer(200, {"status": "ready"})


def test_a_running_gateway_is_looked_at_with_its_workers_links_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = Answer(200, {"status": "ready"}, headers={"date": formatdate(usegmt=True)})
    found = ask(monkeypatch, ready, listed())
    assert {finding.level for finding in found.values()} == {Level.OK}
    assert found.keys() == {"clocks", "gateway", "worker prefill-0", "link prefill-0 -> decode-0"}


@pytest.mark.parametrize(
    ("ready", "workers", "what", "level", "words"),
    [
        (Answer(503, {"error": {"message": "no pair"}}), listed(), "gateway", Level.FAIL, "is not ready: no pair"),
        (Answer(200, {"reason": "degraded: x"}), listed(), "gateway", Level.WARN, "ready, but degraded: x"),
        (READY, Answer(401, {"error": {"message": "wrong key"}}), "workers", Level.WARN, "answered 401: wrong key"),
        (READY, listed(ledger_error=1), "worker prefill-0", Level.FAIL, "contradicts itself"),
        (READY, listed(overdue=3), "worker prefill-0", Level.WARN, "3 block(s) are held past"),
        (READY, listed(state="unhealthy", problem="quarantine"), "worker prefill-0", Level.WARN, "unhealthy: quarantine"),
        (
            READY, listed(links=[LINK | {"state": "failed", "reason": "no route"}]), "link prefill-0 -> decode-0", Level.WARN,
            "failed, breaker closed: no route",
        ),
        (
            READY, listed(links=[LINK | {"transport": "tcp", "failed_transports": ["shm"]}]), "link prefill-0 -> decode-0",
            Level.WARN, "over tcp, since shm did not work",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_gateway_is_named(
    monkeypatch: pytest.MonkeyPatch, ready: Answer, workers: Answer, what: str, level: Level, words: str
) -> None:
    finding = ask(monkeypatch, ready, workers)[what]
    assert finding.level is level
    assert words in finding.found
    assert finding.mend


def test_clocks_that_differ_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Answer(200, {}, headers={"date": formatdate(time.time() - 100, usegmt=True)})
    finding = ask(monkeypatch, late, listed())["clocks"]
    assert finding.level is Level.WARN
    assert finding.found.endswith("s behind")


def test_a_bad_url_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Answer:
        raise GatewayUnreachable("x")

    monkeypatch.setattr(GatewayClient, "get", refuse)
    assert [finding.level for finding in check_gateway(questions())] == [Level.OK]
    assert [finding.level for finding in check_gateway(questions(url="nowhere"))] == [Level.FAIL]
