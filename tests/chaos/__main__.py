"""``make chaos``: every fault of the scenarios on real processes, a table, and an exit status."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from chaos.report import print_table, write_json
from chaos.scenario import load_scenarios
from chaos.suite import run_scenarios


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Failures (F4) or names of scenarios (decode-killed); may be repeated.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Run each scenario so often.")] = 1,
    list_only: Annotated[bool, typer.Option("--list", help="Say what there is and do nothing.")] = False,
    output: Annotated[Path, typer.Option(help="Where the JSON goes; logs of failures go beside it.")] = Path(
        "bench-results/chaos.json"
    ),
) -> int:
    """Breaks a running installation in every way that a scenario describes, and counts what became of its requests."""
    scenarios = load_scenarios()
    if only:
        wanted = {word for entry in only for word in entry.split(",")}
        known = {name for scenario in scenarios for name in (scenario.name, *scenario.failures)}
        if unknown := wanted - known:
            raise typer.BadParameter(f"{', '.join(sorted(unknown))}: --list shows what there is")
        scenarios = [s for s in scenarios if wanted & {s.name, *s.failures}]
    if list_only:
        for scenario in scenarios:
            print(f"{' '.join(scenario.failures):12} {scenario.name}: {scenario.says}")
        return 0
    started_s = time.monotonic()
    logs = output.parent / "chaos-logs"
    scenarios = [replace(scenario, repeat=scenario.repeat * repeat) for scenario in scenarios]
    outcomes = asyncio.run(run_scenarios(scenarios, logs, lambda text: print(text, flush=True)))
    print_table(outcomes)
    write_json(outcomes, output)
    num_failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes) - num_failed} of {len(outcomes)} scenarios passed in {time.monotonic() - started_s:.0f} s")
    print(f"JSON: {output}")
    return 1 if num_failed else 0


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    sys.exit(app(standalone_mode=False))
