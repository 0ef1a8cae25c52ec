"""The short form of `make chaos`: real processes, real faults, and every token compared with an undisturbed run."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from pathlib import Path

import pytest
from chaos.descriptors import Held, held_by_process, more_held
from chaos.report import Outcome, print_table, write_json
from chaos.results import Result
from chaos.scenario import FOLDER, Scenario, load_scenarios
from chaos.suite import run_scenarios

SHORT = FOLDER / "short"
# What has to be covered, by the numbers of the list of failures.
COVERED = {*range(1, 9), *range(11, 21), 22, *range(26, 29), *range(30, 33), 40, 41, 43, 44}


@pytest.mark.timeout(900)
async def test_every_fault_of_the_short_form_ends_as_it_should(tmp_path_factory: pytest.TempPathFactory) -> None:
    # One test for all: they share an installation, whose start takes longer than they do.
    said: list[str] = []
    outcomes = await run_scenarios(load_scenarios(SHORT), tmp_path_factory.mktemp("logs"), said.append)
    failed = {o.scenario.name: (o.problems, o.result.notes[:5]) for o in outcomes if o.problems}
    assert not failed, "\n".join([str(failed), *said])


def test_every_failure_that_must_be_covered_has_a_scenario() -> None:
    covered = {int(failure[1:]) for scenario in load_scenarios() for failure in scenario.failures}
    assert covered >= COVERED


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"name": "x", "failures": [], "says": "", "stpes": []}, "stpes"),
        ({"name": "x", "failures": [], "says": "", "steps": [{"kill": "decode-0"}]}, "exactly one of"),
        ({"name": "x", "failures": [], "says": "", "steps": [{"when": {"moon": 1}, "pause": 1}]}, "moon"),
        ({"name": "x", "failures": [], "says": "", "expect": {"faild": 1}}, "faild"),
        ({"name": "x", "failures": [], "says": "", "load": {"request": 1}}, "request"),
    ],
)
def test_a_scenario_with_a_mistake_is_refused(document: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Scenario.parse(document)


def test_a_sweep_gives_one_variant_for_each_value() -> None:
    scenario = Scenario.parse(
        {
            "name": "x",
            "failures": ["F3"],
            "says": "",
            "sweep": {"K": [1, 7]},
            "repeat": 2,
            "steps": [{"when": {"tokens": "$K"}, "fault": {"link": "a>b-$K:kv", "cut_after_pieces": "$K"}}],
        }
    )
    variants = scenario.variants()
    assert [steps[0].when["tokens"] for steps in variants] == [1, 7, 1, 7]
    assert variants[1][0].arguments == {"link": "a>b-7:kv", "cut_after_pieces": 7}


def test_the_report_is_json_and_says_what_failed(tmp_path: Path) -> None:
    result = Result(requests=3, failed=1, errors=Counter(worker_lost=1), notes=["x-1: worker_lost"])
    scenario = Scenario.parse({"name": "x", "failures": ["F3"], "says": "", "expect": {"min_injected": 2}})
    outcome = Outcome(scenario, result, result.problems(scenario.expect), num_runs=1, took_s=1.0)
    assert outcome.problems == ["failed 1, at most 0", "injected 0, at least 2"]
    print_table([outcome])
    write_json([outcome], tmp_path / "new" / "chaos.json")
    (written,) = json.loads((tmp_path / "new" / "chaos.json").read_text())["scenarios"]
    assert (written["passed"], written["errors"], written["requests"]) == (False, {"worker_lost": 1}, 3)


def test_connections_that_peers_open_late_are_no_leak_and_others_are() -> None:
    def held(files: int = 3, **connections: Counter[str]) -> Held:
        return Held(files, 0, **connections)

    key, peer = ("prefill-0", 1), ("decode-0", 2)
    before = {key: held(), peer: held()}
    late = held(outgoing=Counter({"decode-0:grpc": 2, "decode-0:kv": 1}))
    reached = held(incoming=Counter({"decode-0:grpc": 2, "decode-0:kv": 1}))
    assert more_held(before, {key: late, peer: reached}) == {}
    twice = held(outgoing=Counter({"decode-0:kv": 2}))
    assert more_held(before, {key: twice, peer: reached}) == {
        "prefill-0 connections to decode-0:kv": 1,
        "decode-0 connections from nobody to decode-0:grpc": 2,
    }
    assert more_held(before, {key: held(files=5), peer: held()}) == {"prefill-0 files": 2}
    assert more_held(before, {("prefill-0", 9): held(files=5)}) == {}


def test_descriptors_are_told_apart(tmp_path: Path) -> None:
    pid = os.getpid()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        before = held_by_process(pid, {port: "a:kv"}, {})
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0], (tmp_path / "file").open("w"):
            now = held_by_process(pid, {port: "a:kv"}, {port: "b:kv"})
    assert (now.files - before.files, now.outgoing, now.incoming) == (1, {"a:kv": 1}, {"b:kv": 1})
