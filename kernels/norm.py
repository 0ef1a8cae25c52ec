"""Root-mean-square normalisation, alone and with the residual addition before it.

    y_i = w_i * x_i / sqrt(mean_j(x_j^2) + eps)

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467), equation 4. The mean and the
scaling are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.kernels.launch import jit, next_power_of_2, select, tl
from baton.kernels.tuning import num_warps_for_row

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


@jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,  # [outer, inner, hidden]
    residual_ptr: tl.tensor,  # [outer * inner, hidden] contiguous; read with HAS_RESIDUAL
    weight_ptr: tl.tensor,  # [hidden]
    y_ptr: tl.tensor,  # [outer * inner, hidden] contiguous
    new_residual_ptr: tl.tensor,  # the same; written with HAS_RESIDUAL
    num_inner: tl.tensor,
    outer_stride: tl.tensor,  # of x
    inner_stride: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= hidden
    hidden: tl.constexpr,
) -> None:
    # Grid: (outer * inner,). One program normalises one row, held in registers.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden

    x_row_ptr = x_ptr + (row // num_inner) * outer_stride + (row % num_inner) * inner_stride
    x = tl.load(x_row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * hidden + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + residual).to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + row * hidden + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)

    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = weight * (x * inverse_rms)
    tl.store(y_ptr + row * hidden + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = x.shape[-1]
    # Heads of a fused projection are strided twice; anything else is rows.
    rows = x if x.dim() == 3 else x.reshape(-1, 1, hidden)
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = y if residual is None else torch.empty_like(y)
    block = next_power_of_2(hidden)
    if y.numel() > 0:
        _rms_norm_kernel[(rows.shape[0] * rows.shape[1],)](
            rows,
            y if residual is None else residual.contiguous(),
            weight,
            y,
            new_residual,
            rows.shape[1],
            rows.stride(0),
            rows.stride(1),
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            hidden=hidden,
            num_warps=num_warps_for_row(block),
        )
    return y, new_residual


def _rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, None, weight, eps)[0]


def _fused_add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, residual, weight, eps)


def rms_norm(
    x: torch.Tensor,  # [..., hidden]
    weight: torch.Tensor,  # [hidden], dtype of x
    eps: float,
) -> torch.Tensor:  # [..., hidden], contiguous
    """Normalise the last dimension of ``x`` to a root mean square of one and scale it by ``weight``."""
    return select(x.device, torch_path=_rms_norm_torch, triton_path=_rms_norm_triton, reference=rms_norm_ref)(
        x, weight, eps
    )


def fused_add_rms_norm(
    x: torch.Tensor,  # [..., hidden]
    residual: torch.Tensor,  # [..., hidden], dtype of x
    weight: torch.Tensor,  # [hidden], dtype of x
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # normalised, new residual
    """``x + residual`` and its ``rms_norm``. Neither input is changed."""
    return select(
        x.device,
        torch_path=_fused_add_rms_norm_torch,
        triton_path=_fused_add_rms_norm_triton,
        reference=fused_add_rms_norm_ref,
    )(x, residual, weight, eps)
