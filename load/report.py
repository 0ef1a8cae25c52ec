"""Rows of a benchmark, the table that people read and the JSON that programs compare."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside the limit or peer that was measured in the same run. ``repeats`` are the single values.

    Without a value: what could not be measured here, with the reason.
    """

    name: str
    value: float | None
    unit: str
    repeats: tuple[float, ...] = ()
    limit_name: str = ""
    limit: float | None = None
    skipped: str = ""  # why there is no value

    @property
    def ratio(self) -> float | None:
        return self.value / self.limit if self.limit and self.value is not None else None


def median_row(
    name: str, unit: str, repeats: Sequence[float], limit_name: str = "", limit_repeats: Sequence[float] = ()
) -> Row:
    """A row of medians. Repeats of value and limit were taken in turns, so both saw the same machine."""
    limit = statistics.median(limit_repeats) if limit_repeats else None
    return Row(name, statistics.median(repeats), unit, tuple(repeats), limit_name, limit)


def machine() -> dict[str, Any]:
    """Where the figures are from."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def environment() -> dict[str, Any]:
    """The machine, and the library that does the work."""
    import torch

    return {**machine(), "torch": torch.__version__}


def print_table(rows: Iterable[Row], env: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{env['cpu']}, {env['cores']} cores, torch {env['torch']}, {env['date']}")
    for column in ("what", "value", "min .. max", "limit or peer in the same run", "ratio"):
        table.add_column(column, justify="left" if column in ("what", "limit or peer in the same run") else "right")
    for row in rows:
        spread = f"{_short(min(row.repeats))} .. {_short(max(row.repeats))}" if row.repeats else ""
        limit = row.skipped if row.limit is None else f"{row.limit_name} {_short(row.limit)} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        value = "skipped" if row.value is None else f"{_short(row.value)} {row.unit}"
        table.add_row(row.name, value, spread, limit, ratio)
    console.print(table)


def write_json(rows: Iterable[Row], env: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema_version": SCHEMA_VERSION,
        "environment": env,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        # A fixed command in the checkout's own folder.
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
