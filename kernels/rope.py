"""Rotary position embedding, in the half-rotation ("neox") form that Hugging Face checkpoints use.

For a token at position p, each pair (x_i, x_{i + r/2}), i < r/2, of the first r = rotary_dim elements of a head turns
by the angle p * inv_freq_i:

    y_i         = x_i cos(p f_i) - x_{i + r/2} sin(p f_i)
    y_{i + r/2} = x_{i + r/2} cos(p f_i) + x_i sin(p f_i)

Elements from r on are copied. Su et al., "RoFormer", 2021 (arXiv:2104.09864), equation 34, with the pairing of
GPT-NeoX. The rotation is computed in float32 and rounded once.
"""

from __future__ import annotations

import torch

from baton.kernels.launch import select

__all__ = ["build_rope_cache", "rotary_embedding", "rotary_embedding_ref"]


def build_rope_cache(
    inv_freq: torch.Tensor,  # [rotary_dim / 2] float32
    max_positions: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # [max_positions, rotary_dim]
    """The cosines (first half of a row) and sines (second half) of every position, times ``scale``.

    ``scale`` is the attention factor of the scaled variants (1 for plain RoPE). Angles are float32, as in transformers:
    a more exact table would give other tokens than the checkpoint's authors got.
    """
    positions = torch.arange(max_positions, dtype=torch.float32, device=inv_freq.device)
    angles = torch.outer(positions, inv_freq.float())
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * scale).to(dtype)


def _rotate_ref(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[positions].float().unsqueeze(1).chunk(2, dim=-1)
    x_f32 = x.float()
    first, second, rest = torch.split(x_f32, [rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)


def rotary_embedding_ref(
    q: torch.Tensor,  # [T, num_heads, head_dim]
    k: torch.Tensor,  # [T, num_kv_heads, head_dim]
    positions: torch.Tensor,  # [T] int64
    cos_sin: torch.Tensor,  # [max_positions, rotary_dim]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula above, literally."""
    return _rotate_ref(q, positions, cos_sin), _rotate_ref(k, positions, cos_sin)


def _rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    num_tokens, num_heads, head_dim = x.shape
    half = cos.shape[-1]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=torch.float32, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < head_dim:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out.to(x.dtype)


def _adjacent_heads(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Queries and keys as one [T, num_heads + num_kv_heads, head_dim] view, where they are slices of one projection."""
    num_tokens, num_heads, head_dim = q.shape
    if (
        q.stride() != k.stride()
        or q.stride()[1:] != (head_dim, 1)
        or k.data_ptr() != q.data_ptr() + num_heads * head_dim * q.element_size()
        or q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
    ):
        return None
    return q.as_strided((num_tokens, num_heads + k.shape[1], head_dim), q.stride())


def _rotary_embedding_torch(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin.index_select(0, positions).float().unsqueeze(1).chunk(2, dim=-1)
    both = _adjacent_heads(q, k)
    if both is None:
        return _rotate_torch(q, cos, sin), _rotate_torch(k, cos, sin)
    rotated = _rotate_torch(both, cos, sin)  # one pass over both: half the calls, which is what decoding pays for
    return rotated[:, : q.shape[1]], rotated[:, q.shape[1] :]


def rotary_embedding(
    q: torch.Tensor,  # [T, num_heads, head_dim]
    k: torch.Tensor,  # [T, num_kv_heads, head_dim]
    positions: torch.Tensor,  # [T] int64
    cos_sin: torch.Tensor,  # [max_positions, rotary_dim], from build_rope_cache
) -> tuple[torch.Tensor, torch.Tensor]:  # like q and k; the two may be views of one tensor
    """Rotate each head of ``q`` and ``k`` to its token's position. The inputs are not changed.

    ``head_dim`` must be contiguous; the other dimensions may be strided (slices of a fused projection).
    """
    return select(q.device, torch_path=_rotary_embedding_torch, reference=rotary_embedding_ref)(
        q, k, positions, cos_sin
    )
