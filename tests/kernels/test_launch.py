"""The choice between implementations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.kernels import Backend, launch, use_backend


def pick(device: str) -> str:
    choice: str = launch.select(torch.device(device), torch_path="torch", triton_path="triton", reference="ref")  # type: ignore[type-var]
    return choice


@pytest.mark.parametrize(
    ("backend", "on_cpu", "on_gpu"),
    [
        ("auto", "torch", "triton"),
        ("torch", "torch", "torch"),
        ("reference", "ref", "ref"),
        ("triton", "triton", "triton"),
    ],
)
def test_each_backend_selects_its_path(backend: str, on_cpu: str, on_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COMPILES", True)
    with use_backend(backend):
        assert (pick("cpu"), pick("cuda")) == (on_cpu, on_gpu)


def test_without_triton_a_gpu_takes_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COMPILES", False)
    with use_backend("auto"):
        assert pick("cuda") == "torch"


def test_a_block_ends_with_the_backend_it_began_with() -> None:
    with use_backend("torch"):
        with pytest.raises(RuntimeError), use_backend("reference"):
            raise RuntimeError
        assert pick("cpu") == "torch"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'; expected one of auto, torch, triton, reference"), use_backend("fast"):
        pass
    assert list(Backend) == ["auto", "torch", "triton", "reference"]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from baton import kernels
from baton.kernels import launch
assert not launch.HAS_TRITON
weight = torch.ones(4)
assert torch.allclose(kernels.rms_norm(torch.full((2, 4), 3.0), weight, 0.0), torch.ones(2, 4))
try:
    kernels.set_backend("triton")
except ValueError as error:
    assert "it needs the triton package" in str(error)
else:
    sys.exit("set_backend took triton")
"""


def test_the_package_works_without_triton(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
