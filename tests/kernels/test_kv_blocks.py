"""gather_blocks and scatter_blocks."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import gather_blocks, scatter_blocks, use_backend
from baton.kernels.kv_blocks import gather_blocks_ref, scatter_blocks_ref

# Bytes of a block that are a multiple of 8, 4, and 2 only; and more than a program copies.
SHAPES = [(2, 2, 16, 2, 8), (1, 2, 1, 1, 3), (1, 1, 1, 1, 1), (1, 2, 16, 3, 64)]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_blocks", [0, 1, 5])
@pytest.mark.parametrize("block_shape", SHAPES)
def test_blocks_are_copied_bit_for_bit(
    block_shape: tuple[int, ...], num_blocks: int, index_dtype: torch.dtype, backend: str, dtype: torch.dtype
) -> None:
    cache = torch.randn(9, *block_shape).to(dtype)
    ids = torch.randperm(9)[:num_blocks].to(index_dtype)
    out = torch.empty(num_blocks, *block_shape, dtype=dtype)
    expected = torch.empty_like(out)
    gather_blocks_ref(cache, ids, expected)
    with use_backend(backend):
        gather_blocks(cache, ids, out)
    assert torch.equal(out, expected)

    src = torch.randn(num_blocks, *block_shape).to(dtype)
    expected = cache.clone()
    scatter_blocks_ref(expected, ids, src)
    with use_backend(backend):
        scatter_blocks(cache, ids, src)
    assert torch.equal(cache, expected)


def test_references_equal_indexing() -> None:
    cache, ids = torch.randn(5, 2, 3), torch.tensor([4, 0, 2])
    out = torch.empty(3, 2, 3)
    gather_blocks_ref(cache, ids, out)
    assert torch.equal(out, cache[ids])
    before = cache.clone()
    scatter_blocks_ref(cache, ids, -out)
    before[ids] = -out
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    "buffer",
    [torch.empty(2, 2, 4), torch.empty(3, 2, 3, dtype=torch.float16), torch.empty(3, 3, 2).transpose(1, 2)],
    ids=["shape", "dtype", "strides"],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer: torch.Tensor) -> None:
    cache, ids = torch.zeros(5, 2, 3), torch.tensor([4, 0, 2])
    with pytest.raises(ValueError, match=r"expected contiguous \(3, 2, 3\) torch.float32"):
        gather_blocks(cache, ids, buffer)
    with pytest.raises(ValueError, match=r"expected contiguous \(3, 2, 3\) torch.float32"):
        scatter_blocks(cache, ids, buffer)
