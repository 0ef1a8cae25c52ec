"""Start, drain and end of a real process: order of the steps, exit status, and no life after the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers.waiting import eventually_sync

from baton.services.runtime.process import PARENT_PID_VARIABLE

SCRIPT = Path(__file__).with_name("service_script.py")


class Running:
    def __init__(self, process: subprocess.Popen[str], steps: Path) -> None:
        self.process = process
        self._steps = steps

    def steps(self) -> list[str]:
        lines = self._steps.read_text().splitlines() if self._steps.exists() else []
        return [line for line in lines if not line.startswith("pid ")]

    def until(self, step: str) -> Running:
        eventually_sync(lambda: step in self.steps(), timeout_s=30, what=f"step {step!r}")
        return self

    def send(self, number: signal.Signals) -> Running:
        self.process.send_signal(number)
        return self

    def status(self) -> int:
        return self.process.wait(timeout=30)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> Running:
        steps = tmp_path / "steps"
        argv = [sys.executable, str(SCRIPT), arguments[0], str(steps), *arguments[1:]]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return Running(process, steps)

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_then_stops_with_status_0(run: Callable[..., Running], number: signal.Signals) -> None:
    service = run("normal").until("started").send(number)
    assert service.status() == 0
    assert service.steps() == ["start", "started", "drain", "drained", "stop"]
    assert "Traceback" not in service.errors()


def test_garbage_is_collected_from_when_it_serves(run: Callable[..., Running]) -> None:
    service = run("collector").until("collects True").send(signal.SIGTERM)
    assert service.status() == 0
    assert service.steps()[:4] == ["start", "collects False", "started", "collects True"]


def test_a_second_signal_stops_now(run: Callable[..., Running]) -> None:
    service = run("stubborn").until("started").send(signal.SIGTERM).until("drain").send(signal.SIGINT)
    assert service.status() == 128 + signal.SIGINT
    assert service.steps() == ["start", "started", "drain", "stop"]


def test_two_signals_at_once_are_one_request(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAME_REQUEST_S", "600")
    service = run("stubborn", "short").until("started").send(signal.SIGTERM).until("drain").send(signal.SIGTERM)
    assert service.status() == 0
    assert "drain timed out" in service.errors()


def test_a_drain_ends_when_its_time_is_over(run: Callable[..., Running]) -> None:
    service = run("stubborn", "short").until("started").send(signal.SIGTERM)
    assert service.status() == 0
    assert service.steps() == ["start", "started", "drain", "stop"]
    assert "drain timed out" in service.errors()


@pytest.mark.parametrize("mode", ["stuck-loop", "stuck-thread"])
def test_what_hangs_while_stopping_does_not_hold_the_end(run: Callable[..., Running], mode: str) -> None:
    service = run(mode).until("started").send(signal.SIGTERM)
    assert service.status() == 0
    assert service.steps() == ["start", "started", "drain", "drained", "stop"]


def test_a_signal_while_loading_does_not_wait_for_the_load(run: Callable[..., Running]) -> None:
    service = run("load").until("start").send(signal.SIGTERM)
    assert service.process.wait(timeout=10) == 0
    assert service.steps() == ["start", "stop"]


def test_a_signal_before_there_is_a_service_is_status_0(run: Callable[..., Running]) -> None:
    assert run("import").until("importing").send(signal.SIGTERM).status() == 0


def test_what_cannot_be_served_is_one_line_and_status_2(run: Callable[..., Running]) -> None:
    service = run("refuse")
    assert service.status() == 2
    assert service.errors() == "scripted: model.safetensors: tensor x expected [2], found [3]\n"
    assert service.steps() == ["start", "stop"]


def test_a_failure_while_serving_is_logged_and_status_1(run: Callable[..., Running]) -> None:
    service = run("fail")
    assert service.status() == 1
    assert "step loop died" in service.errors()
    assert service.steps() == ["start", "started", "stop"]


@pytest.mark.parametrize("mode", ["normal", "load"])
def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path, mode: str) -> None:
    steps = tmp_path / "steps"
    parent_code = (
        "import os, subprocess, sys, signal;"
        f"env = dict(os.environ, {PARENT_PID_VARIABLE}=str(os.getpid()));"
        "subprocess.Popen(sys.argv[1:], env=env, start_new_session=True);"
        "signal.pause()"
    )
    argv = [sys.executable, "-c", parent_code, sys.executable, str(SCRIPT), mode, str(steps)]
    parent = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        eventually_sync(
            lambda: steps.exists() and "start\n" in steps.read_text(), timeout_s=30, what="the child's start"
        )
        child = psutil.Process(int(steps.read_text().split()[1]))
    finally:
        parent.kill()
        parent.wait()
    eventually_sync(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, what="the child's end")


def test_a_child_whose_parent_is_already_gone_ends_at_once(tmp_path: Path) -> None:
    nobody = os.getpid() + 1  # not our pid, so not the child's parent
    argv = [sys.executable, str(SCRIPT), "normal", str(tmp_path / "steps")]
    child = subprocess.run(argv, env={**os.environ, PARENT_PID_VARIABLE: str(nobody)}, timeout=30, check=False)
    assert child.returncode == -signal.SIGKILL
