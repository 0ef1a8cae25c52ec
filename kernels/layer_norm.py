"""Layer normalisation over the last dimension.

    y_i = w_i * (x_i - mean(x)) / sqrt(var(x) + eps) + b_i,    var(x) = mean_j((x_j - mean(x))^2)

Ba, Kiros and Hinton, "Layer Normalization", 2016 (arXiv:1607.06450), equations 3 and 4. Computed in float32 and
rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.kernels.launch import select

__all__ = ["layer_norm", "layer_norm_ref"]


def layer_norm_ref(
    x: torch.Tensor,  # [..., hidden]
    weight: torch.Tensor,  # [hidden]
    bias: torch.Tensor | None,  # [hidden]
    eps: float,
) -> torch.Tensor:  # [..., hidden]
    """The formula above, literally."""
    x_f32 = x.float()
    centred = x_f32 - x_f32.mean(dim=-1, keepdim=True)
    variance = centred.pow(2).mean(dim=-1, keepdim=True)
    y = weight.float() * centred * torch.rsqrt(variance + eps)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _layer_norm_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def layer_norm(
    x: torch.Tensor,  # [..., hidden]
    weight: torch.Tensor,  # [hidden], dtype of x
    bias: torch.Tensor | None,  # [hidden], dtype of x
    eps: float,
) -> torch.Tensor:  # [..., hidden], contiguous
    """Normalise the last dimension of ``x`` to mean 0 and variance 1, scale by ``weight`` and shift by ``bias``."""
    return select(x.device, torch_path=_layer_norm_torch, reference=layer_norm_ref)(x, weight, bias, eps)
