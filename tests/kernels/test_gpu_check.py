"""The program behind ``make gpu-check``, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from baton.kernels import gpu_check, launch
from baton.kernels.gpu_cases import Case, Problem


def test_without_a_gpu_it_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["gpu-check: no CUDA GPU that Triton can compile for; nothing was checked"]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's sigmoid
def test_every_case_agrees_with_its_reference() -> None:
    pytest.importorskip("triton")
    assert gpu_check.compare(torch.device("cpu"), (torch.float32,)) == []


def use_cases(monkeypatch: pytest.MonkeyPatch, *problems: Problem) -> None:
    case = Case("made_up", lambda device, dtype, small: iter(problems))
    monkeypatch.setattr(gpu_check, "CASES", (case,))


def backend_index() -> torch.Tensor:
    """A result that differs between implementations."""
    return torch.tensor(float(launch.select(torch.device("cpu"), torch_path=0, triton_path=1, reference=2)))  # type: ignore[type-var]


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    target = torch.zeros(1)
    use_cases(
        monkeypatch,
        Problem("returned", backend_index),
        Problem("written", lambda: target.add_(backend_index()), written=target),
        Problem("right", partial(torch.ones, 3)),
    )
    wrong = gpu_check.compare(torch.device("cpu"), (torch.float32,))
    assert [line.partition(", torch")[0] for line in wrong] == ["made_up, returned", "made_up, written"]


def test_a_run_prints_its_table_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU's clock replaced: 1 ms a call."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(launch, "COMPILES", True)
    monkeypatch.setattr(gpu_check, "measure", lambda call: 1e-3)
    monkeypatch.setattr(gpu_check, "measure_limits", lambda: gpu_check.Limits(4e12, 8e14))
    use_cases(
        monkeypatch,
        Problem("copy", partial(torch.ones, 3), num_bytes=2 * 10**9),
        Problem("product", partial(torch.ones, 3), num_flops=4 * 10**11),
    )
    file = tmp_path / "table.json"
    assert gpu_check.main(["--json", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("Some GPU, torch")
    rows = json.loads(file.read_text())
    assert [(row["problem"], row["rate"], row["unit"], row["share_of_limit"]) for row in rows] == [
        ("copy", 2000.0, "GB/s", 0.5),
        ("product", 400.0, "TFLOP/s", 0.5),
    ]
