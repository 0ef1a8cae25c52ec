"""``python -m helpers.simulation``: runs seeds, on every core, and says what they showed.

python -m helpers.simulation --seeds 1000 [--first 0]
python -m helpers.simulation --seed 17 --trace
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable

from helpers.simulation.world import Outcome, run_seed

PROGRESS_EVERY = 200


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="simulation", description="Deterministic simulation of a whole installation.")
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="one alone")
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        outcome = run_seed(options.seed, keep_trace=True)
        if options.trace or outcome.problems:
            print(outcome.trace)
        print(f"seed {outcome.seed}: {dict(outcome.ends)} {dict(outcome.codes)} trace {outcome.digest}")
        print("\n".join(outcome.problems) or "no violation")
        return bool(outcome.problems)
    return _run_many(range(options.first, options.first + options.seeds), options.workers)


def _run_many(seeds: Iterable[int], num_workers: int) -> int:
    start_s = time.monotonic()
    totals: dict[str, Counter[str]] = {"ends": Counter(), "codes": Counter(), "faults": Counter()}
    failed: list[int] = []
    num_seeds = num_tokens = 0
    gc.collect()
    gc.freeze()  # what is imported stays: no collection in the workers needs to look at it
    with multiprocessing.get_context("fork").Pool(num_workers) as pool:
        for outcome in pool.imap_unordered(_run_quietly, seeds, chunksize=4):
            num_seeds += 1
            num_tokens += outcome.num_tokens
            totals["ends"] += outcome.ends
            totals["codes"] += outcome.codes
            totals["faults"] += outcome.faults
            if outcome.problems:
                failed.append(outcome.seed)
                print(f"seed {outcome.seed}:", *outcome.problems[:4], sep="\n    ", flush=True)
            if num_seeds % PROGRESS_EVERY == 0:
                print(f"... {num_seeds} seeds, violations in {len(failed)}", flush=True)
    gc.unfreeze()  # or libraries complain at the end of what was never freed
    took_s = time.monotonic() - start_s
    for what, counts in totals.items():
        print(f"{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    each_s = num_workers * took_s / max(1, num_seeds)
    print(f"{num_seeds} seeds, {num_tokens} tokens, {took_s:.0f} s, {each_s:.3f} s a seed and core")
    print(f"violations in {len(failed)} seeds" + (f": {sorted(failed)[:40]}" if failed else ""))
    if failed:
        print(f"one again, with everything that happens: --seed {min(failed)} --trace")
    return bool(failed)


def _run_quietly(seed: int) -> Outcome:
    return run_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
