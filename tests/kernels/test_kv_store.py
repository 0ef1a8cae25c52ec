"""store_kv."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import store_kv, use_backend
from baton.kernels.kv_store import store_kv_ref


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 64), (1, 1), (5, 20)])
@pytest.mark.parametrize(("num_tokens", "block_size"), [(0, 16), (1, 16), (17, 4), (6, 1)])
def test_tokens_land_in_their_slots_and_nowhere_else(
    num_tokens: int, block_size: int, num_kv_heads: int, head_dim: int, backend: str, dtype: torch.dtype
) -> None:
    """The caches are one layer of a cache that is contiguous over layers; keys and values are slices of a projection."""
    cache = torch.randn(8, 3, 2, block_size, num_kv_heads, head_dim).to(dtype)
    expected = cache.clone()
    projection = torch.randn(num_tokens, 4 * num_kv_heads, head_dim).to(dtype)
    k, v = projection[:, 2 * num_kv_heads : 3 * num_kv_heads], projection[:, 3 * num_kv_heads :]
    slots = torch.randperm(8 * block_size)[:num_tokens]
    with use_backend(backend):
        store_kv(k, v, cache[:, 1, 0], cache[:, 1, 1], slots)
    store_kv_ref(k, v, expected[:, 1, 0], expected[:, 1, 1], slots)
    assert torch.equal(cache, expected)


def test_the_reference_follows_the_layout() -> None:
    """Slot s is token s % block_size of block s // block_size."""
    cache = torch.zeros(4, 1, 2, 2, 1, 1)
    store_kv_ref(
        torch.full((1, 1, 1), 5.0), torch.full((1, 1, 1), 7.0), cache[:, 0, 0], cache[:, 0, 1], torch.tensor([5])
    )
    assert cache.nonzero().tolist() == [[2, 0, 0, 1, 0, 0], [2, 0, 1, 1, 0, 0]]
    assert cache[2, 0, :, 1, 0, 0].tolist() == [5.0, 7.0]
