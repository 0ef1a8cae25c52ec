"""silu_and_mul, gelu_and_mul and gelu."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from baton.kernels import gelu, gelu_and_mul, silu_and_mul, use_backend
from baton.kernels.activation import GeluForm, gelu_and_mul_ref, gelu_ref, silu_and_mul_ref

# The interpreter's sigmoid takes exp(-x), which overflows to infinity and gives the right 0, as on a GPU; numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

SHAPES = [(1, 2), (3, 10), (2, 1030), (0, 8)]  # 1,030: a gate that ends inside a tile of 1,024 elements
FORMS: list[GeluForm] = ["none", "tanh"]


@pytest.mark.parametrize("shape", SHAPES)
def test_silu_and_mul_equals_its_reference(
    shape: tuple[int, int], backend: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    gate_up = (3 * torch.randn(shape)).to(dtype)
    with use_backend(backend):
        assert_close(silu_and_mul(gate_up), silu_and_mul_ref(gate_up), **tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_and_mul_equals_its_reference(
    shape: tuple[int, int], form: GeluForm, backend: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    gate_up = (3 * torch.randn(shape)).to(dtype)
    with use_backend(backend):
        assert_close(gelu_and_mul(gate_up, form), gelu_and_mul_ref(gate_up, form), **tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_gelu_equals_its_reference(
    form: GeluForm, backend: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    x = (3 * torch.randn(2, 3, 41)).to(dtype)
    with use_backend(backend):
        assert_close(gelu(x, form), gelu_ref(x, form), **tolerance)


def test_a_gate_is_not_changed(backend: str) -> None:
    gate_up = torch.randn(2, 6)
    before = gate_up.clone()
    with use_backend(backend):
        silu_and_mul(gate_up)
        gelu_and_mul(gate_up)
        gelu(gate_up)
    assert torch.equal(gate_up, before)


def test_references_equal_torch() -> None:
    x = 3 * torch.randn(4, 22)
    gate, up = x[:, :11], x[:, 11:]
    assert_close(silu_and_mul_ref(x), F.silu(gate) * up)
    for form in FORMS:
        assert_close(gelu_ref(x, form), F.gelu(x, approximate=form), rtol=1e-5, atol=1e-6)
        assert_close(gelu_and_mul_ref(x, form), F.gelu(gate, approximate=form) * up, rtol=1e-5, atol=1e-6)
