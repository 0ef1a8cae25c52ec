"""The fixtures that every test gets do what they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run_pytest(tmp_path: Path, code: str, *arguments: str) -> str:
    """The output of a run over ``code`` under our conftest."""
    (tmp_path / "test_it.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", *arguments, "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout


def test_a_test_that_leaves_a_process_behind_fails_and_the_process_is_ended(tmp_path: Path) -> None:
    code = """
import subprocess
def test_leaks():
    with open("pid", "w") as file:
        file.write(str(subprocess.Popen(["sleep", "600"]).pid))
def test_does_not():
    subprocess.Popen(["true"]).wait()
"""
    output = run_pytest(tmp_path, code, "-p", "no:randomly")
    assert "1 error" in output
    assert "2 passed" in output
    assert "child processes are left: ['sleep 600']" in output
    pid = (tmp_path / "pid").read_text()
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_torch_draws_the_same_numbers_in_a_run_of_the_same_seed(tmp_path: Path) -> None:
    code = """
import torch
def test_draw():
    print("DRAWN", torch.rand(1).item())
"""
    one, two = (run_pytest(tmp_path, code, "-s", "--randomly-seed=7").split("DRAWN")[1].split()[0] for _ in range(2))
    assert one == two
