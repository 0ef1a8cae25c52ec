"""Layer normalisation over the last dimension.

    y_i = w_i * (x_i - mean(x)) / sqrt(var(x) + eps) + b_i,    var(x) = mean_j((x_j - mean(x))^2)

Ba, Kiros and Hinton, "Layer Normalization", 2016 (arXiv:1607.06450), equations 3 and 4. Computed in float32 and
rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.kernels.launch import jit, next_power_of_2, select, tl
from baton.kernels.tuning import num_warps_for_row

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


@jit
def _layer_norm_kernel(
    x_ptr: tl.tensor,  # [T, hidden]
    weight_ptr: tl.tensor,  # [hidden]
    bias_ptr: tl.tensor,  # [hidden]; read with HAS_BIAS
    y_ptr: tl.tensor,  # [T, hidden]
    eps: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= hidden
    hidden: tl.constexpr,
) -> None:
    # Grid: (T,). One program normalises one row, held in registers.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden

    x = tl.load(x_ptr + row * hidden + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / hidden
    centred = tl.where(mask, x - mean, 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / hidden + eps)

    y = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) * centred * inverse_deviation
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * hidden + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


def _layer_norm_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    hidden = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    block = next_power_of_2(hidden)
    if y.numel() > 0:
        _layer_norm_kernel[(x.numel() // hidden,)](
            x,
            weight,
            weight if bias is None else bias,
            y,
            eps,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            hidden=hidden,
            num_warps=num_warps_for_row(block),
        )
    return y


def layer_norm(
    x: torch.Tensor,  # [..., hidden]
    weight: torch.Tensor,  # [hidden], dtype of x
    bias: torch.Tensor | None,  # [hidden], dtype of x
    eps: float,
) -> torch.Tensor:  # [..., hidden], contiguous
    """Normalise the last dimension of ``x`` to mean 0 and variance 1, scale by ``weight`` and shift by ``bias``."""
    return select(x.device, torch_path=_layer_norm_torch, triton_path=_layer_norm_triton, reference=layer_norm_ref)(
        x, weight, bias, eps
    )
