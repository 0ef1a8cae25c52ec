"""The CPU benchmark."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import cpu_bench


def test_it_prints_a_row_per_problem(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_bench, "_ROUNDS", 1)
    monkeypatch.setattr(cpu_bench.kernels, "keep_freed_memory", lambda: True)  # it is for the whole process
    monkeypatch.setattr(
        cpu_bench,
        "problems",
        lambda: iter(
            [
                ("float32", cpu_bench.linears(torch.float32, 2)),
                ("bfloat16", cpu_bench.decode(torch.bfloat16, 2, 32)),
                ("float32", cpu_bench.prefill(torch.float32, 16, 32)),
                ("float32", cpu_bench.sampling(1, 5, 0.9)),
            ]
        ),
    )
    assert cpu_bench.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.endswith("x") for line in lines[1:])
