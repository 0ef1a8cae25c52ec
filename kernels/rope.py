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

from baton.kernels.launch import jit, next_power_of_2, select, tl

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
    half = cos.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.shape[-1] == 2 * half:
        (first, second), (first_out, second_out) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    else:
        sizes = [half, half, x.shape[-1] - 2 * half]
        first, second, rest = torch.split(x, sizes, dim=-1)
        first_out, second_out, rest_out = torch.split(out, sizes, dim=-1)
        rest_out.copy_(rest)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin)
    return out if x.dtype is torch.float32 else out.to(x.dtype)


def _adjacent_heads(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Queries and keys as one [T, num_heads + num_kv_heads, head_dim] view, where they are slices of one projection."""
    num_tokens, num_heads, head_dim = q.shape
    strides = q.stride()
    if strides != k.stride() or strides[1:] != (head_dim, 1):
        return None
    if k.data_ptr() != q.data_ptr() + num_heads * head_dim * q.element_size():
        return None
    num_both = num_heads + k.shape[1]
    end = q.storage_offset() + (num_tokens - 1) * strides[0] + num_both * head_dim
    if end * q.element_size() > q.untyped_storage().nbytes():
        return None  # two tensors that happen to be neighbours in memory
    return q.as_strided((num_tokens, num_both, head_dim), strides)


def _rotary_embedding_torch(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    both = _adjacent_heads(q, k)
    if both is None:
        return _rotate_torch(q, cos, sin), _rotate_torch(k, cos, sin)
    rotated = _rotate_torch(both, cos, sin)  # one pass over both: half the calls, which is what decoding pays for
    return rotated[:, : q.shape[1]], rotated[:, q.shape[1] :]


@jit
def _rotate_heads(
    x_ptr: tl.tensor,  # one token's [num_heads, head_dim]
    y_ptr: tl.tensor,  # the same, contiguous
    cos: tl.tensor,  # [BLOCK_HALF]
    sin: tl.tensor,  # [BLOCK_HALF]
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,  # rotary_dim / 2
    head_stride: tl.tensor,  # of x
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # power of two >= half
    BLOCK_REST: tl.constexpr,  # power of two >= head_dim - rotary_dim
) -> None:
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    for begin in range(0, num_heads, BLOCK_HEADS):
        heads = begin + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (heads < num_heads) & (pair < half)
        source = x_ptr + heads * head_stride + pair
        target = y_ptr + heads * head_dim + pair
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(target + half, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=mask)
        if head_dim > 2 * half:
            rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
            rest_mask = (heads < num_heads) & (rest < head_dim)
            unrotated = tl.load(x_ptr + heads * head_stride + rest, mask=rest_mask, other=0.0)
            tl.store(y_ptr + heads * head_dim + rest, unrotated, mask=rest_mask)


@jit
def _rotary_embedding_kernel(
    q_ptr: tl.tensor,  # [T, num_heads, head_dim]
    k_ptr: tl.tensor,  # [T, num_kv_heads, head_dim]
    positions_ptr: tl.tensor,  # [T] int64
    cos_sin_ptr: tl.tensor,  # [max_positions, 2 * half]
    q_out_ptr: tl.tensor,  # like q, contiguous
    k_out_ptr: tl.tensor,  # like k, contiguous
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
) -> None:
    # Grid: (T,). One program rotates all heads of one token: they share their angles.
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    angles_ptr = cos_sin_ptr + position * (2 * half) + pair
    cos = tl.load(angles_ptr, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angles_ptr + half, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    _rotate_heads(
        q_ptr + token * q_token_stride,
        q_out_ptr + token * (num_heads * head_dim),
        cos,
        sin,
        num_heads,
        head_dim,
        half,
        q_head_stride,
        BLOCK_HEADS,
        BLOCK_HALF,
        BLOCK_REST,
    )
    _rotate_heads(
        k_ptr + token * k_token_stride,
        k_out_ptr + token * (num_kv_heads * head_dim),
        cos,
        sin,
        num_kv_heads,
        head_dim,
        half,
        k_head_stride,
        BLOCK_HEADS,
        BLOCK_HALF,
        BLOCK_REST,
    )


def _rotary_embedding_triton(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, head_dim = q.shape
    half = cos_sin.shape[-1] // 2
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if num_tokens > 0:
        _rotary_embedding_kernel[(num_tokens,)](
            q,
            k,
            positions,
            cos_sin.contiguous(),
            q_out,
            k_out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            BLOCK_HEADS=min(8, next_power_of_2(num_heads)),
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(head_dim - 2 * half),
            num_heads=num_heads,
            num_kv_heads=k.shape[1],
            head_dim=head_dim,
            half=half,
            num_warps=4,
        )
    return q_out, k_out


def rotary_embedding(
    q: torch.Tensor,  # [T, num_heads, head_dim]
    k: torch.Tensor,  # [T, num_kv_heads, head_dim]
    positions: torch.Tensor,  # [T] int64
    cos_sin: torch.Tensor,  # [max_positions, rotary_dim], from build_rope_cache
) -> tuple[torch.Tensor, torch.Tensor]:  # like q and k; the two may be views of one tensor
    """Rotate each head of ``q`` and ``k`` to its token's position. The inputs are not changed.

    ``head_dim`` must be contiguous; the other dimensions may be strided (slices of a fused projection).
    """
    return select(
        q.device,
        torch_path=_rotary_embedding_torch,
        triton_path=_rotary_embedding_triton,
        reference=rotary_embedding_ref,
    )(q, k, positions, cos_sin)
