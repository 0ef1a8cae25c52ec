"""Root-mean-square normalisation, alone and with the residual addition before it.

    y_i = w_i * x_i / sqrt(mean_j(x_j^2) + eps)

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467), equation 4. The mean and the
scaling are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.kernels.launch import select

__all__ = ["fused_add_rms_norm", "fused_add_rms_norm_ref", "rms_norm", "rms_norm_ref"]


def rms_norm_ref(
    x: torch.Tensor,  # [..., hidden]
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> torch.Tensor:  # [..., hidden]
    """The formula above, literally."""
    x_f32 = x.float()
    mean_square = x_f32.pow(2).mean(dim=-1, keepdim=True)
    return (weight.float() * x_f32 * torch.rsqrt(mean_square + eps)).to(x.dtype)


def fused_add_rms_norm_ref(
    x: torch.Tensor,  # [..., hidden]
    residual: torch.Tensor,  # [..., hidden]
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # normalised, new residual
    """Add, round to the dtype of ``x``, then normalise the rounded sum."""
    new_residual = x + residual
    return rms_norm_ref(new_residual, weight, eps), new_residual


def _rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _fused_add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    new_residual = x + residual
    return _rms_norm_torch(new_residual, weight, eps), new_residual


def rms_norm(
    x: torch.Tensor,  # [..., hidden]
    weight: torch.Tensor,  # [hidden], dtype of x
    eps: float,
) -> torch.Tensor:  # [..., hidden], contiguous
    """Normalise the last dimension of ``x`` to a root mean square of one and scale it by ``weight``."""
    return select(x.device, torch_path=_rms_norm_torch, reference=rms_norm_ref)(x, weight, eps)


def fused_add_rms_norm(
    x: torch.Tensor,  # [..., hidden]
    residual: torch.Tensor,  # [..., hidden], dtype of x
    weight: torch.Tensor,  # [hidden], dtype of x
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # normalised, new residual
    """``x + residual`` and its ``rms_norm``. Neither input is changed."""
    return select(x.device, torch_path=_fused_add_rms_norm_torch, reference=fused_add_rms_norm_ref)(
        x, residual, weight, eps
    )
