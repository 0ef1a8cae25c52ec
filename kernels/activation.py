"""Activations of the feed-forward block: gated SiLU and GELU, and plain GELU.

    silu(x) = x * sigmoid(x)
    gelu(x) = x * Phi(x)                      Phi: the normal distribution function, through erf
    gelu(x) ~ x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))                             "tanh"
    act_and_mul([g, u]) = act(g) * u

Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202); Hendrycks and Gimpel, "Gaussian Error Linear
Units", 2016 (arXiv:1606.08415).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from baton.kernels.launch import cdiv, jit, select, tl

__all__ = ["GeluForm", "gelu", "gelu_and_mul", "gelu_and_mul_ref", "gelu_ref", "silu_and_mul", "silu_and_mul_ref"]

GeluForm = Literal["none", "tanh"]  # torch's names: "none" is the exact form
_BLOCK = 1024  # elements of a program: 8 a thread


def silu_and_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:  # [T, 2 * intermediate] -> [T, intermediate]
    """The formula above in float32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu_ref(x: torch.Tensor, approximate: GeluForm) -> torch.Tensor:
    """The formula above in float32, rounded once."""
    x_f32 = x.float()
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x_f32 + 0.044715 * x_f32.pow(3))
        return (x_f32 / 2 * (1 + torch.tanh(inner))).to(x.dtype)
    return (x_f32 / 2 * (1 + torch.erf(x_f32 / math.sqrt(2)))).to(x.dtype)


def gelu_and_mul_ref(gate_up: torch.Tensor, approximate: GeluForm) -> torch.Tensor:
    """The formula above in float32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gelu_ref(gate, approximate) * up).to(gate_up.dtype)


def _silu_and_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _gelu_and_mul_torch(gate_up: torch.Tensor, approximate: GeluForm) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate).mul_(up)


def _gelu_torch(x: torch.Tensor, approximate: GeluForm) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


@jit
def _activate(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """silu, gelu or gelu_tanh of a float32 tile."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    if KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2z); 1.5957... = 2 sqrt(2 / pi)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def _activation_kernel(
    x_ptr: tl.tensor,  # [T, size], or [T, 2 * size] with GATED: gate, then up
    y_ptr: tl.tensor,  # [T, size]
    size: tl.tensor,
    x_row_stride: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # Grid: (T, cdiv(size, BLOCK)). One program computes BLOCK elements of one row.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size

    y = _activate(tl.load(x_ptr + row * x_row_stride + columns, mask=mask, other=0.0).to(tl.float32), KIND)
    if GATED:
        y *= tl.load(x_ptr + row * x_row_stride + size + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * size + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    x = x.contiguous()
    width = x.shape[-1]
    size = width // 2 if gated else width
    y = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        grid = (y.numel() // size, cdiv(size, _BLOCK))
        _activation_kernel[grid](x, y, size, width, KIND=kind, GATED=gated, BLOCK=_BLOCK, num_warps=4)
    return y


def _gelu_kind(approximate: GeluForm) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _silu_and_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    return _launch(gate_up, "silu", gated=True)


def _gelu_and_mul_triton(gate_up: torch.Tensor, approximate: GeluForm) -> torch.Tensor:
    return _launch(gate_up, _gelu_kind(approximate), gated=True)


def _gelu_triton(x: torch.Tensor, approximate: GeluForm) -> torch.Tensor:
    return _launch(x, _gelu_kind(approximate), gated=False)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:  # [T, 2 * intermediate] -> [T, intermediate]
    """``silu(gate) * up``, where the gate is the first half of each row."""
    return select(
        gate_up.device, torch_path=_silu_and_mul_torch, triton_path=_silu_and_mul_triton, reference=silu_and_mul_ref
    )(gate_up)


def gelu_and_mul(gate_up: torch.Tensor, approximate: GeluForm = "none") -> torch.Tensor:
    """``gelu(gate) * up``; shapes as in ``silu_and_mul``."""
    return select(
        gate_up.device, torch_path=_gelu_and_mul_torch, triton_path=_gelu_and_mul_triton, reference=gelu_and_mul_ref
    )(gate_up, approximate)


def gelu(x: torch.Tensor, approximate: GeluForm = "none") -> torch.Tensor:
    """GELU of each element."""
    return select(x.device, torch_path=_gelu_torch, triton_path=_gelu_triton, reference=gelu_ref)(x, approximate)
