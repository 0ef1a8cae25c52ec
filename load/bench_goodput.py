"""Goodput of several ways to use the same cores, on pieces of public traces: the rate at which nine in ten meet their targets.

``baton serve`` with a small model and ``baton bench`` as an open loop before it, all on the same machine: colocated workers
with a thread each, one colocated worker that has all threads, and pools of prefill and decode workers where prompts always
go through the prefill pool (remote), never do (local), or go the cheaper way (adaptive). A trace is a piece of Azure's, whose
lengths are divided by ``LENGTH_DIVISOR`` and whose times are multiplied to give a rate; every policy gets the same requests.

Targets are multiples of what a request of mean lengths takes alone. A run sends one TPOT with all its requests, and the
longest TTFT; it counts for every pair of that TPOT, since a policy that is not told how strict a stream is cannot take care.
Rates are shares of what the colocated workers finish a second when everything is there at once.

The traces are not part of Baton: ``BATON_AZURE_TRACES`` names a folder with the two files of 2023. ``--folder`` keeps the
records, so that several short runs make one figure.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.load.generator.traces import TraceRow, parse_trace
from baton.load.goodput_grid import Pair, Point, Took, attainment, goodput
from baton.load.report import Row, environment, print_table, write_json
from baton.load.server import get_json, num_cores, serve
from baton.load.small_llama import make_small_llama

TRACES_VARIABLE = "BATON_AZURE_TRACES"
# First rows of the pieces: where the traffic is even, since most of the code trace is a burst or a pause.
PIECES = {"conv": 600, "code": 1600}
LENGTH_DIVISOR = 4
TTFT_FACTORS = (6.0, 12.0, 24.0)
TPOT_FACTORS = (2.5, 6.0)
SHARES = (0.4, 0.6, 0.8, 1.0, 1.2)
NUM_REQUESTS = 80
ADAPTIVE = "adaptive"
COLOCATED = ("colocated", "colocated, one worker")
FIXED = (*COLOCATED, "remote", "local")
# Below this share of good requests under the widest targets, higher rates are not asked for.
_HOPELESS = 0.5


@dataclass(frozen=True, slots=True)
class Alone:
    """What a machine does: the yardstick of rates and targets."""

    rate: float  # requests/s that colocated workers finish when all are there
    ttft_s: float  # of a request of mean lengths, alone
    tpot_s: float

    def pairs(self, tpot_factor: float) -> list[Pair]:
        return [Pair(factor * self.ttft_s, tpot_factor * self.tpot_s) for factor in TTFT_FACTORS]


def options_of(policy: str, cores: int) -> tuple[str, ...]:
    """Of ``baton serve``."""
    if policy == "colocated":
        return ("--mode", "colocated", "--decode", str(cores), "--threads-per-worker", "1")
    if policy == "colocated, one worker":
        return ("--mode", "colocated", "--threads-per-worker", str(cores))
    placement = "auto" if policy == ADAPTIVE else policy
    num_prefill = max(1, cores // 2)
    pools = ("--prefill", str(num_prefill), "--decode", str(max(1, cores - num_prefill)), "--threads-per-worker", "1")
    return (*pools, "--placement", placement)


class Measurement:
    """Runs, and where their records are kept: ``TRACE/POLICY/FACTOR/RATE.N.jsonl`` in a folder."""

    def __init__(self, folder: Path, traces: Path, num_requests: int, shares: Sequence[float]) -> None:
        self._folder = folder
        self._traces = traces
        self._num_requests = num_requests
        self._shares = shares
        self._seed = 0
        self._model = folder / "model"
        if not (self._model / "config.json").exists():
            self._model.mkdir(parents=True, exist_ok=True)
            make_small_llama(self._model)

    def run(self, trace: str, policies: Sequence[str], tpot_factors: Sequence[float] = TPOT_FACTORS) -> None:
        rows = self._piece(trace)
        alone = self.alone(trace) or self._measure_alone(trace, rows)
        for policy in policies:
            with self._serve(policy) as url:
                self._load(
                    url, rows[:24], 0.6 * alone.rate, alone.pairs(TPOT_FACTORS[-1])[-1], None
                )  # costs are learned
                for factor in tpot_factors:
                    self._climb(url, rows, alone, self._folder / trace / policy / f"{factor:g}", factor)
                    self._keep_decisions(url, self._folder / trace / policy / f"{factor:g}")

    def points(self, trace: str) -> list[Point]:
        """Goodput of every policy that was measured, for each pair of targets; all repeats of a rate together."""
        alone = self.alone(trace)
        points: list[Point] = []
        for factor in TPOT_FACTORS if alone is not None else ():
            assert alone is not None
            took = {policy: self._took(self._folder / trace / policy / f"{factor:g}") for policy in (*FIXED, ADAPTIVE)}
            for pair in alone.pairs(factor):
                goodputs = {
                    policy: goodput({rate: attainment(some, pair) for rate, some in by_rate.items()})
                    for policy, by_rate in took.items()
                    if by_rate
                }
                points.append(Point(pair, goodputs))
        return points

    def alone(self, trace: str) -> Alone | None:
        path = self._folder / trace / "alone.json"
        return Alone(**json.loads(path.read_text())) if path.exists() else None

    def _climb(self, url: str, rows: Sequence[TraceRow], alone: Alone, folder: Path, factor: float) -> None:
        """Rates that grow, until most requests miss."""
        widest = alone.pairs(factor)[-1]
        for share in self._shares:
            rate = share * alone.rate
            folder.mkdir(parents=True, exist_ok=True)
            number = len(list(folder.glob(f"{rate:.3f}.*.jsonl")))
            path = folder / f"{rate:.3f}.{number}.jsonl"
            self._load(url, rows, rate, widest, path)
            share_good = attainment(_read(path), widest)
            typer.echo(f"  {folder}: {rate:.2f} requests/s, {share_good:.0%} good", err=True)
            if share_good < _HOPELESS:
                return

    def _measure_alone(self, trace: str, rows: Sequence[TraceRow]) -> Alone:
        input_len = round(statistics.fmean(row.input_len for row in rows) / LENGTH_DIVISOR)
        output_len = max(8, round(statistics.fmean(row.output_len for row in rows) / LENGTH_DIVISOR))
        path = self._folder / trace / "alone.jsonl"
        with self._serve(COLOCATED[0]) as url:
            lengths = {"--input-len": str(input_len), "--output-len": str(output_len)}
            _bench(url, path, {**lengths, "--num-prompts": "12", "--request-rate": "1000", "--max-concurrency": "1"})
            records = _records(path)
            # From when it was sent: one after the other, they are all due at once.
            ttft_s = statistics.median(record["ttft_from_send_s"] for record in records)
            tpot_s = statistics.median(record["tpot_s"] for record in records)
            self._load(url, rows, 1000.0, None, path)
            records = _records(path)
            rate = len(records) / max(record["ended_s"] for record in records)
        alone = Alone(rate, ttft_s, tpot_s)
        (self._folder / trace / "alone.json").write_text(json.dumps(asdict(alone)))
        typer.echo(f"  {trace}: {alone}", err=True)
        return alone

    def _piece(self, trace: str) -> list[TraceRow]:
        paths = sorted(self._traces.glob(f"AzureLLMInferenceTrace_{trace}*.csv"))
        if not paths:
            raise typer.BadParameter(f"{self._traces} has no AzureLLMInferenceTrace_{trace}*.csv")
        first = PIECES[trace]
        with paths[0].open(encoding="utf-8") as file:
            return parse_trace(file, limit=first + self._num_requests)[first:]

    def _load(self, url: str, rows: Sequence[TraceRow], rate: float, promise: Pair | None, path: Path | None) -> None:
        """The rows at a mean rate, each with the promise. ``path``: where the records go."""
        trace = self._folder / "piece.csv"
        start_s, end_s = rows[0].at_s, rows[-1].at_s
        scale = (len(rows) - 1) / rate / max(end_s - start_s, 1e-3)
        lines = [f"{(row.at_s - start_s) * scale:.6f},{row.input_len},{row.output_len}" for row in rows]
        trace.write_text("\n".join(("Timestamp,Request tokens,Response tokens", *lines)))
        options = {"--trace": str(trace), "--length-scale": str(1 / LENGTH_DIVISOR)}
        flags: tuple[str, ...] = ()
        if promise is not None:
            options["--goodput"] = f"ttft:{promise.ttft_s * 1e3:.1f} tpot:{promise.tpot_s * 1e3:.1f}"
            flags = ("--send-slo",)
        # Other tokens each time: what one run has left in a cache must not help the next.
        self._seed += 1
        _bench(url, path or self._folder / "warm-up.jsonl", {**options, "--seed": str(self._seed)}, *flags)

    def _serve(self, policy: str) -> Any:
        common = ("--model", str(self._model), "--served-model-name", "small", "--dtype", "float32")
        limits = ("--max-model-len", "4096", "--log-level", "warning")
        return serve(*common, *limits, *options_of(policy, num_cores()), log=self._folder / "serve.log")

    def _keep_decisions(self, url: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "decisions.json").write_text(json.dumps(get_json(f"{url}/v1/decisions"), indent=1))

    def _took(self, folder: Path) -> dict[float, list[Took]]:
        by_rate: dict[float, list[Took]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            by_rate.setdefault(float(path.name.rsplit(".", 2)[0]), []).extend(_read(path))
        return by_rate


def rows_of(trace: str, points: Sequence[Point]) -> list[Row]:
    """The adaptive policy beside the best of the fixed ones and beside colocated, and the fixed ones themselves."""
    rows: list[Row] = []
    for point in points:
        name = f"goodput, {trace}, TTFT {point.pair.ttft_s * 1e3:.0f} ms, TPOT {point.pair.tpot_s * 1e3:.1f} ms"
        for policy in FIXED:
            if policy in point.goodputs:
                rows.append(Row(f"{name}: {policy}", point.goodputs[policy], "requests/s"))
        if ADAPTIVE not in point.goodputs:
            continue
        for others, words in ((FIXED, "best of all fixed"), (COLOCATED, "best colocated")):
            best, amount = point.best(others)
            rows.append(
                Row(f"{name}: {ADAPTIVE}", point.goodputs[ADAPTIVE], "requests/s", (), f"{words}, {best}:", amount)
            )
    return rows


def bench_goodput() -> list[Row]:
    """All policies on both traces."""
    traces = os.environ.get(TRACES_VARIABLE)
    if traces is None:
        return [Row("goodput", None, "requests/s", skipped=f"{TRACES_VARIABLE} names no folder with the traces")]
    with tempfile.TemporaryDirectory() as name:
        measurement = Measurement(Path(name), Path(traces), NUM_REQUESTS, SHARES)
        rows: list[Row] = []
        for trace in PIECES:
            measurement.run(trace, (*FIXED, ADAPTIVE))
            rows += rows_of(trace, measurement.points(trace))
        return rows


def main(
    folder: Annotated[Path, typer.Option(help="Where records are kept; those that are there count too.")],
    traces: Annotated[Path, typer.Option(envvar=TRACES_VARIABLE, help="Folder of the two traces.")],
    trace: Annotated[list[str] | None, typer.Option(help="conv or code; repeatable. Default: both.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Which to run; repeatable. none: only report.")] = None,
    factor: Annotated[list[float] | None, typer.Option(help="TPOT that is sent, as a multiple; repeatable.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Rates, as shares of capacity; repeatable.")] = None,
    num_requests: Annotated[int, typer.Option(help="Rows of the trace.")] = NUM_REQUESTS,
) -> None:
    """A part of the section, so that a machine need not be kept for all of it at once."""
    measurement = Measurement(folder, traces, num_requests, share or SHARES)
    rows: list[Row] = []
    for name in trace or list(PIECES):
        if policy != ["none"]:
            measurement.run(name, policy or (*FIXED, ADAPTIVE), factor or TPOT_FACTORS)
        rows += rows_of(name, measurement.points(name))
    env = environment()
    print_table(rows, env)
    write_json(rows, env, folder / "goodput.json")


def _bench(url: str, records: Path, options: dict[str, str], *flags: str) -> None:
    """One open loop by ``baton bench``."""
    records.parent.mkdir(parents=True, exist_ok=True)
    common = {"--url": url, "--endpoint": "completions", "--prompt": "token-ids", "--num-warmups": "0"}
    command = [sys.executable, "-m", "baton.services.local", "bench", "--no-progress", "--no-save", *flags]
    command += [part for option in ({**common, **options, "--records": str(records)}).items() for part in option]
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if run.returncode:
        raise RuntimeError(f"baton bench failed:\n{run.stdout[-1000:]}{run.stderr[-2000:]}")


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _read(path: Path) -> list[Took]:
    return [
        Took(record["ttft_s"], record["tpot_s"] or 0.0) if record["outcome"] == "completed" else Took(None, None)
        for record in _records(path)
    ]


if __name__ == "__main__":
    # What is set for tests must not slow workers down.
    os.environ.pop("OMP_NUM_THREADS", None)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
