# ruff: noqa: T201 (a program that prints)
"""``python -m baton.kernels.gpu_check``: are the Triton kernels right on this GPU, and how fast?

First every kernel against its reference on small shapes in three dtypes, then a table of times on the shapes of an 8B
model in bfloat16: the share of the memory or matrix limit measured in the same run, and the torch path beside it. Exit
code 0 if all is right, 1 if a kernel is wrong, 3 if there is no GPU to run on. ``--tune`` times the attention tiles of
``tuning.attention_candidates`` instead and prints them best first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.kernels import launch, tuning, use_backend
from baton.kernels.gpu_cases import CASES, Problem

NO_GPU = 3
# Largest difference from the float32 reference, absolute and relative; sampling is compared exactly.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_REPEATS = 20
_WARM_UPS = 3
_CACHE_FLUSH_BYTES = 256 << 20  # more than any L2


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device does at best, measured in this run."""

    bytes_per_s: float
    flops_per_s: float


def compare(device: torch.device, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)) -> list[str]:
    """Run every kernel on its small problems beside its reference. Returns one line per difference."""
    wrong = []
    for case in CASES:
        for dtype in dtypes:
            for problem in case.build(device, dtype, True):
                results = []
                for backend in ("triton", "reference"):
                    with use_backend(backend):
                        results.append(_result(problem))
                try:
                    torch.testing.assert_close(*results, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
                except AssertionError as error:
                    wrong.append(f"{case.name}, {problem.shape}, {dtype}: {' '.join(str(error).split())}")
    return wrong


def _result(problem: Problem) -> object:
    if problem.written is None:
        return problem.call()
    problem.written.zero_()
    problem.call()
    return problem.written.clone()


def measure(call: Callable[[], object]) -> float:
    """Median seconds of a call on the GPU, with a cold L2 cache."""
    flush = torch.empty(_CACHE_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(_WARM_UPS):
        call()
    times: list[float] = []
    for _ in range(_REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_limits() -> Limits:
    """A copy of 1 GiB and a bfloat16 product of 8,192 x 8,192 matrices."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return Limits(
        bytes_per_s=2 * source.numel() / measure(lambda: target.copy_(source)),
        flops_per_s=2 * 8192**3 / measure(lambda: matrix @ matrix),
    )


def row_of(case: str, problem: Problem, triton_s: float, torch_s: float, limits: Limits) -> dict[str, object]:
    """A row of the table: the rate that binds the problem, and its share of the limit."""
    if problem.num_flops:
        rate, limit, unit, scale = problem.num_flops / triton_s, limits.flops_per_s, "TFLOP/s", 1e12
    else:
        rate, limit, unit, scale = problem.num_bytes / triton_s, limits.bytes_per_s, "GB/s", 1e9
    return {
        "kernel": case,
        "problem": problem.shape,
        "triton_us": round(triton_s * 1e6, 1),
        "torch_us": round(torch_s * 1e6, 1),
        "rate": round(rate / scale, 1),
        "unit": unit,
        "share_of_limit": round(rate / limit, 3),
    }


def format_row(row: dict[str, object]) -> str:
    """A row as a line of text."""
    return (
        f"{row['kernel']!s:18} {row['problem']!s:34} {row['triton_us']:>10} {row['torch_us']:>10} "
        f"{row['rate']:>9} {row['unit']!s:8} {row['share_of_limit']:>7.1%}"
    )


def benchmark(device: torch.device) -> list[dict[str, object]]:
    """Time every kernel on its large problems, printing rows as they come."""
    limits = measure_limits()
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: copy {limits.bytes_per_s / 1e9:,.0f} GB/s, "
        f"bfloat16 product {limits.flops_per_s / 1e12:,.0f} TFLOP/s"
    )
    print(f"{'kernel':18} {'problem':34} {'triton us':>10} {'torch us':>10} {'rate':>9} {'':8} {'limit':>7}")
    rows = []
    for case in CASES:
        for problem in case.build(device, torch.bfloat16, False):
            times = []
            for backend in ("triton", "torch"):
                with use_backend(backend):
                    times.append(measure(problem.call))
            rows.append(row_of(case.name, problem, times[0], times[1], limits))
            print(format_row(rows[-1]), flush=True)
    return rows


def tune(device: torch.device) -> None:
    """Time the candidate tiles of both attention kernels on their large problems."""
    for case in CASES:
        op = case.name.removesuffix("_attention")
        if op == case.name:
            continue
        for problem in case.build(device, torch.bfloat16, False):
            timed = []
            for tiles in tuning.attention_candidates(op, 128, torch.bfloat16):
                tuning.override(op, tiles)
                try:
                    with use_backend("triton"):
                        timed.append((measure(problem.call), tiles))
                except RuntimeError as error:  # too large for this GPU
                    print(f"{tiles}: {str(error).splitlines()[0]}", file=sys.stderr)
                finally:
                    tuning.override(op, None)
            print(f"{case.name}, {problem.shape}:")
            for seconds, tiles in sorted(timed, key=lambda entry: entry[0])[:5]:
                print(f"  {seconds * 1e6:10.1f} us  {tiles}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m baton.kernels.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--tune", action="store_true", help="time attention tiles instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    options = parser.parse_args(argv)
    if not (torch.cuda.is_available() and launch.COMPILES):
        print("gpu-check: no CUDA GPU that Triton can compile for; nothing was checked", file=sys.stderr)
        return NO_GPU
    device = torch.device("cuda", torch.cuda.current_device())
    if options.tune:
        tune(device)
        return 0
    wrong = compare(device)
    for line in wrong:
        print(f"WRONG {line}")
    if wrong:
        return 1
    print(f"every kernel agrees with its reference in {', '.join(str(dtype) for dtype in TOLERANCES)}")
    rows = benchmark(device)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
