"""rotary_embedding and its table."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from baton.kernels import build_rope_cache, rotary_embedding, use_backend
from baton.kernels.rope import rotary_embedding_ref

MAX_POSITIONS = 64


def inverse_frequencies(rotary_dim: int) -> torch.Tensor:
    return 10_000.0 ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)


# (num_heads, num_kv_heads, head_dim, rotary_dim): more heads than a program's tile, one head, partly rotated heads.
SHAPES = [(9, 3, 64, 64), (1, 1, 2, 2), (5, 5, 20, 12), (12, 2, 24, 24)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "rotary_dim"), SHAPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_rotary_embedding_equals_its_reference(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    backend: str,
    dtype: torch.dtype,
    tolerance: dict[str, float],
) -> None:
    """q and k as slices of one projection, which is how the engine passes them; they are left as they were."""
    projection = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    before = projection.clone()
    q, k = projection[:, :num_heads], projection[:, num_heads : num_heads + num_kv_heads]
    positions = torch.randint(MAX_POSITIONS, (num_tokens,))
    cos_sin = build_rope_cache(inverse_frequencies(rotary_dim), MAX_POSITIONS, 1.0, torch.float32)
    with use_backend(backend):
        q_out, k_out = rotary_embedding(q, k, positions, cos_sin)
    expected_q, expected_k = rotary_embedding_ref(q, k, positions, cos_sin)
    assert_close(q_out, expected_q, **tolerance)
    assert_close(k_out, expected_k, **tolerance)
    assert torch.equal(projection, before)


def test_separate_tensors_rotate_alike(backend: str) -> None:
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    positions = torch.tensor([5, 0, 63])
    cos_sin = build_rope_cache(inverse_frequencies(8), MAX_POSITIONS, 1.0, torch.float32)
    with use_backend(backend):
        q_out, k_out = rotary_embedding(q, k, positions, cos_sin)
    expected_q, expected_k = rotary_embedding_ref(q, k, positions, cos_sin)
    assert_close(q_out, expected_q)
    assert_close(k_out, expected_k)


def test_the_reference_equals_transformers() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=500)
    module = LlamaRotaryEmbedding(config)
    q, k = torch.randn(6, 4, 24), torch.randn(6, 2, 24)
    positions = torch.tensor([0, 1, 2, 17, 250, 499])
    cos, sin = module(q, positions[None])
    expected_q, expected_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)

    cos_sin = build_rope_cache(module.inv_freq, 500, module.attention_scaling, torch.float32)
    q_out, k_out = rotary_embedding_ref(q, k, positions, cos_sin)
    assert_close(q_out, expected_q[0].transpose(0, 1))
    assert_close(k_out, expected_k[0].transpose(0, 1))


def test_the_table_is_scaled() -> None:
    table = build_rope_cache(inverse_frequencies(8), 3, 2.0, torch.float32)
    assert_close(table[0], torch.tensor([2.0] * 4 + [0.0] * 4))
    assert table.shape == (3, 8)
