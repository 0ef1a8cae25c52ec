"""What three times as many requests as can be served leave of the service: goodput, the time of a refusal, and memory.

``baton serve`` with the bundled model, ``baton bench`` as an open loop before it. Peak goodput is the best of rates that grow;
capacity is the rate at which it was found. All processes share the machine, so that figures are of this machine alone;
what is compared are two figures of one run.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from baton.load.report import Row
from baton.load.server import get_json, serve

TTFT_MS, TPOT_MS = 1000, 100
INPUT_LEN, OUTPUT_LEN = 256, 64
FIRST_RATE, GROWTH = 2.0, 1.5
SEARCH_S, OVERLOAD_S, OVERLOAD = 15, 60, 3.0
MAX_REFUSAL_MS = 50.0
# Of each worker. Its pages come into being when they are first written: a pool that the search fills grows no more.
POOL = "256MiB"
MIN_GOODPUT_SHARE = 0.9
# Fewer good ones than this share of the best so far: the peak lies behind.
_PAST_PEAK = 0.8


def bench_overload() -> list[Row]:
    """Rows with their limits: the goodput's is a least one, the others are most."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serve("--log-level", "warning", "--kv-cache-memory", POOL, log=Path(folder) / "serve.log") as url,
    ):
        _load(url, FIRST_RATE, SEARCH_S, Path(folder))  # so that nothing is the first of its kind
        capacity, peak = _find_peak(url, Path(folder))
        before_mb = _memory_mb(url)
        figures, records = _load(url, OVERLOAD * capacity, OVERLOAD_S, Path(folder))
        after_mb = _memory_mb(url)
    refusals_ms = sorted(
        1e3 * (record["ended_s"] - record["sent_s"]) for record in records if record["outcome"] == "refused"
    )
    goodput = float(figures["request_goodput"])
    return [
        Row("overload: peak goodput", peak, "requests/s"),
        Row("overload: rate of the peak", capacity, "requests/s"),
        Row("overload: goodput at 3x", goodput, "requests/s", (), "at least 0.9 of peak", MIN_GOODPUT_SHARE * peak),
        Row("overload: refused at 3x", float(figures["refused"]), "requests", (), "sent", float(len(records))),
        Row("overload: failed otherwise", float(figures["failed"]) - float(figures["refused"]), "requests"),
        Row("overload: refusal p99", _percentile(refusals_ms, 0.99), "ms", (), "at most", MAX_REFUSAL_MS),
        Row("overload: memory after", after_mb, "MB", (), "before", before_mb),
    ]  # fmt: skip


def _find_peak(url: str, folder: Path) -> tuple[float, float]:
    """The rate with the best goodput, and that goodput."""
    rate, best = FIRST_RATE, (FIRST_RATE, 0.0)
    while True:
        goodput = float(_load(url, rate, SEARCH_S, folder)[0]["request_goodput"])
        if goodput > best[1]:
            best = (rate, goodput)
        elif goodput < _PAST_PEAK * rate:
            return best
        rate *= GROWTH


def _load(url: str, rate: float, duration_s: int, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One open loop. Returns the figures and the records."""
    figures, records = folder / "figures.json", folder / "records.jsonl"
    options = {
        "--url": url,
        "--request-rate": f"{rate:g}",
        "--duration-s": str(duration_s),
        "--num-prompts": str(math.ceil(2 * rate * duration_s) + 10),
        "--input-len": str(INPUT_LEN),
        "--output-len": str(OUTPUT_LEN),
        "--goodput": f"ttft:{TTFT_MS} tpot:{TPOT_MS}",
        "--output": str(figures),
        "--records": str(records),
    }
    command = [sys.executable, "-m", "baton.services.local", "bench", "--send-slo", "--no-progress"]
    command += [part for option in options.items() for part in option]
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if run.returncode:
        raise RuntimeError(f"baton bench failed:\n{run.stdout[-1000:]}{run.stderr[-2000:]}")
    return json.loads(figures.read_text()), [json.loads(line) for line in records.read_text().splitlines()]


def _memory_mb(url: str) -> float:
    """Memory of the workers and the gateway: the children of whoever started the workers. What several of them have mapped
    (a peer reads a worker's pool) counts once."""
    pids = [int(worker["pid"]) for worker in get_json(f"{url}/v1/workers")["data"]]
    parent = _fields(pids[0], "status")["PPid"]
    family = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    family = [pid for pid in family if _fields(pid, "status").get("PPid") == parent]
    return sum(int(_fields(pid, "smaps_rollup").get("Pss", "0").split()[0]) for pid in family) / 1e3


def _fields(pid: int, name: str) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _percentile(values: list[float], share: float) -> float | None:
    return values[min(len(values) - 1, int(share * len(values)))] if values else None
