"""``make bench``: every figure beside its limit or peer from the same run, as a table and as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from baton.load.report import Row, environment, print_table, write_json


def _transfer() -> list[Row]:
    from baton.load.bench_transfer import bench_transfer

    return bench_transfer()


def _engine() -> list[Row]:
    from baton.load.bench_engine import bench_engine

    return bench_engine()


def _interference() -> list[Row]:
    from baton.load.bench_interference import bench_interference

    return bench_interference()


def _gateway() -> list[Row]:
    from baton.load.bench_gateway import bench_gateway

    return bench_gateway()


def _generator() -> list[Row]:
    from baton.load.bench_generator import bench_generator

    return bench_generator()


def _router() -> list[Row]:
    from baton.load.bench_router import bench_router

    return bench_router()


def _overload() -> list[Row]:
    from baton.load.bench_overload import bench_overload

    return bench_overload()


def _goodput() -> list[Row]:
    from baton.load.bench_goodput import bench_goodput

    return bench_goodput()


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "transfer": _transfer,
    "engine": _engine,
    "interference": _interference,
    "gateway": _gateway,
    "generator": _generator,
    "router": _router,
    "overload": _overload,
    "goodput": _goodput,
}


def main(
    section: Annotated[list[str] | None, typer.Argument(help=f"Which of {', '.join(SECTIONS)}. Default: all.")] = None,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("bench-results/bench.json"),
) -> None:
    """Measures this machine's Baton. Nothing else should be running."""
    names = section or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(SECTIONS)}")
    rows: list[Row] = []
    for name in names:
        typer.echo(f"measuring: {name}", err=True)
        rows += SECTIONS[name]()
    env = environment()
    print_table(rows, env)
    write_json(rows, env, output)
    typer.echo(f"JSON: {output}")


if __name__ == "__main__":
    # Benchmarks choose their own threads; what is set for tests must not slow them down.
    os.environ.pop("OMP_NUM_THREADS", None)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
