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

from baton.kernels.launch import select

__all__ = ["GeluForm", "gelu", "gelu_and_mul", "gelu_and_mul_ref", "gelu_ref", "silu_and_mul", "silu_and_mul_ref"]

GeluForm = Literal["none", "tanh"]  # torch's names: "none" is the exact form


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


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:  # [T, 2 * intermediate] -> [T, intermediate]
    """``silu(gate) * up``, where the gate is the first half of each row."""
    return select(gate_up.device, torch_path=_silu_and_mul_torch, reference=silu_and_mul_ref)(gate_up)


def gelu_and_mul(gate_up: torch.Tensor, approximate: GeluForm = "none") -> torch.Tensor:
    """``gelu(gate) * up``; shapes as in ``silu_and_mul``."""
    return select(gate_up.device, torch_path=_gelu_and_mul_torch, reference=gelu_and_mul_ref)(gate_up, approximate)


def gelu(x: torch.Tensor, approximate: GeluForm = "none") -> torch.Tensor:
    """GELU of each element."""
    return select(x.device, torch_path=_gelu_torch, reference=gelu_ref)(x, approximate)
