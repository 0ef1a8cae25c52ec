"""Kernel tests run the Triton kernels under Triton's interpreter, which is chosen when triton is first imported."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # tests/conftest.py has set it already when the whole suite runs

import pytest
import torch

from baton.kernels import launch

# Largest difference from a float32 reference, absolute and relative: a few units in the last place of each dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Runs a test with the torch path and with the interpreted Triton kernel."""
    if request.param == "triton":
        pytest.importorskip("triton")
        assert launch.INTERPRETED, "triton was imported before TRITON_INTERPRET was set"
    name: str = request.param
    return name


@pytest.fixture(params=TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that a model can have."""
    value: torch.dtype = request.param
    return value


@pytest.fixture
def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """``rtol`` and ``atol`` of the test's dtype, for ``torch.testing.assert_close``."""
    return {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
