"""The same seed is the same run, event by event."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.simulation.world import run_seed

TESTS = Path(__file__).resolve().parents[1]


def test_a_seed_replays_byte_for_byte() -> None:
    first, second = run_seed(11, keep_trace=True), run_seed(11, keep_trace=True)
    assert len(first.trace) > 1000
    assert first.trace == second.trace


def test_tracing_changes_nothing() -> None:
    traced, untraced = run_seed(6, keep_trace=True), run_seed(6)
    assert traced.num_callbacks == untraced.num_callbacks
    assert traced.ends == untraced.ends


def test_a_seed_replays_in_another_process() -> None:
    """Whatever its hash seed: nothing depends on the order of a set of strings, or of addresses."""
    runs = [
        subprocess.run(
            [sys.executable, "-m", "helpers.simulation", "--seed", "11", "--trace"],
            env={**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert "client" in runs[0]
    assert runs[0] == runs[1]
    assert run_seed(11, keep_trace=True).trace in runs[0]
