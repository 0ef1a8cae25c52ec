"""rms_norm, fused_add_rms_norm and layer_norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from baton.kernels import fused_add_rms_norm, layer_norm, rms_norm, use_backend
from baton.kernels.layer_norm import layer_norm_ref
from baton.kernels.norm import fused_add_rms_norm_ref, rms_norm_ref

# One element, odd, a power of two, just above one; no rows at all.
SHAPES = [(1, 1), (3, 7), (5, 123), (2, 256), (4, 3, 65), (0, 16)]
EPS = 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_its_reference(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    with use_backend(backend):
        assert_close(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), **tolerance)


def test_rms_norm_reads_heads_in_place(backend: str) -> None:
    """Qwen3 normalises each head of q, a slice of the fused projection strided over tokens."""
    projection = torch.randn(3, 2 * 5 + 4, 9)
    heads = projection[:, 2:7]
    weight = torch.randn(9)
    with use_backend(backend):
        out = rms_norm(heads, weight, EPS)
    assert_close(out, rms_norm_ref(heads.contiguous(), weight, EPS))
    assert out.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_add_rms_norm_equals_its_reference(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    inputs = x.clone(), residual.clone()
    with use_backend(backend):
        out, new_residual = fused_add_rms_norm(x, residual, weight, EPS)
    expected, expected_residual = fused_add_rms_norm_ref(x, residual, weight, EPS)
    assert_close(out, expected, **tolerance)
    assert_close(new_residual, expected_residual, **tolerance)  # the interpreter truncates to bfloat16, hardware rounds
    assert torch.equal(x, inputs[0])
    assert torch.equal(residual, inputs[1])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_equals_its_reference(
    shape: tuple[int, ...], with_bias: bool, backend: str, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    x = (torch.randn(shape) + 3).to(dtype)  # a mean that must be taken off
    weight = torch.randn(shape[-1]).to(dtype)
    bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
    with use_backend(backend):
        assert_close(layer_norm(x, weight, bias, EPS), layer_norm_ref(x, weight, bias, EPS), **tolerance)


def test_rms_norm_reference_equals_transformers() -> None:
    module = LlamaRMSNorm(37, eps=EPS)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(4, 37)
    assert_close(rms_norm_ref(x, module.weight.detach(), EPS), module(x).detach())


def test_layer_norm_reference_equals_torch() -> None:
    x, weight, bias = torch.randn(4, 37), torch.randn(37), torch.randn(37)
    assert_close(layer_norm_ref(x, weight, bias, EPS), F.layer_norm(x, (37,), weight, bias, EPS))
    assert_close(layer_norm_ref(x, weight, None, EPS), F.layer_norm(x, (37,), weight, None, EPS))
