"""The table that people read, and the JSON that programs compare."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from chaos.results import Result
from chaos.scenario import Scenario
from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 1
_MAX_NOTES = 6
_COLUMNS = ("requests", "failed", "wrong", "lost", "doubled", "leaked", "retries")


@dataclass
class Outcome:
    """A scenario and what came of it. ``problems`` is empty where all is as it has to be."""

    scenario: Scenario
    result: Result
    problems: list[str]
    num_runs: int
    took_s: float


def print_table(outcomes: Sequence[Outcome]) -> None:
    console = Console(width=150)
    table = Table(title="chaos: what went wrong on purpose, and what came of it")
    table.add_column("fault")
    table.add_column("scenario")
    for column in ("runs", *_COLUMNS, "detected s", "recovery s", "clean s"):
        table.add_column(column, justify="right")
    table.add_column("")
    for outcome in outcomes:
        result = outcome.result
        counts = [str(getattr(result, name)) for name in _COLUMNS]
        times = [_seconds(result.detection_s), _seconds(result.recovery_s), _seconds(result.clean_s)]
        verdict = "[red]FAILED[/red]" if outcome.problems else "ok"
        failures = " ".join(outcome.scenario.failures)
        table.add_row(failures, outcome.scenario.name, str(outcome.num_runs), *counts, *times, verdict)
    console.print(table)
    for outcome in outcomes:
        for problem in outcome.problems:
            console.print(f"[red]{outcome.scenario.name}[/red]: {problem}", markup=True, highlight=False)
        if outcome.problems:
            for note in outcome.result.notes[:_MAX_NOTES]:
                console.print(f"  {note[:300]}", markup=False, highlight=False)


def write_json(outcomes: Sequence[Outcome], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema_version": SCHEMA_VERSION,
        "date": time.strftime("%Y-%m-%d"),
        "scenarios": [
            {
                "name": outcome.scenario.name,
                "failures": list(outcome.scenario.failures),
                "says": outcome.scenario.says,
                "passed": not outcome.problems,
                "problems": outcome.problems,
                "runs": outcome.num_runs,
                "took_s": round(outcome.took_s, 1),
                **_as_json(outcome.result),
            }
            for outcome in outcomes
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _as_json(result: Result) -> dict[str, object]:
    values = {each.name: getattr(result, each.name) for each in fields(result)}
    return {**values, "errors": dict(result.errors), "notes": result.notes[:50]}


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
