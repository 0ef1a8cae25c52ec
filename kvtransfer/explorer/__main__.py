"""Explores the handoff protocol and says what was found. The exit status is 1 when something was."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from baton.kvtransfer.explorer.configuration import Configuration, required
from baton.kvtransfer.explorer.search import Found, explore

# As many as the smallest machine that this is meant for has cores.
_NUM_PROCESSES = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m baton.kvtransfer.explorer", description=__doc__)
    parser.add_argument("--faults", type=int, default=2, help="at most so many in a run (default 2)")
    parser.add_argument("--blocks", type=int, default=3, help="of each handoff (default 3)")
    parser.add_argument("--handoffs", type=int, default=2, help="in a run (default 2)")
    options = parser.parse_args(arguments)
    try:
        configurations = required(options.faults, options.blocks, options.handoffs)
    except ValueError as error:
        parser.error(str(error))
    began = time.monotonic()
    with ProcessPoolExecutor(_NUM_PROCESSES) as pool:
        results = list(pool.map(_explore, configurations))
    num_states = sum(found.num_states for found, _ in results)
    num_violations = sum(found.violation is not None for found, _ in results)
    print(
        f"all: {num_states:,} states, {sum(found.num_transitions for found, _ in results):,} transitions, "
        f"{time.monotonic() - began:.0f} s, {num_violations} violations, bound: {options.faults} faults a run"
    )
    return 1 if num_violations else 0


def _explore(configuration: Configuration) -> tuple[Found, float]:
    began = time.monotonic()
    found = explore(configuration)
    seconds = time.monotonic() - began
    sys.stdout.write(report(configuration, found, seconds))
    sys.stdout.flush()
    return found, seconds


def report(configuration: Configuration, found: Found, seconds: float) -> str:
    """A few lines to read."""
    lines = [
        str(configuration),
        f"  {found.num_states:,} states, {found.num_transitions:,} transitions, "
        f"{found.num_machine_states:,} states of machines, {seconds:.0f} s",
    ]
    if found.violation is None:
        lines.append("  no violation")
    else:
        lines.append(f"  VIOLATION of: {found.violation}")
        lines += [f"    {number:3} {line}" for number, line in enumerate(found.trace, start=1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
