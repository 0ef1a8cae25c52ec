"""prefill_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.paged_cache import PagedBatch, make_paged_batch
from torch.testing import assert_close

from baton.kernels import prefill_attention, use_backend
from baton.kernels.prefill_attention import prefill_attention_ref

# (context, new tokens) of each sequence: whole prompts, cached prefixes, single tokens, block borders, a padding row.
BATCHES = {
    "one token": [(1, 1)],
    "whole prompts": [(5, 5), (16, 16), (33, 33)],
    "cached prefixes": [(17, 1), (40, 23), (48, 16), (35, 2)],
    "mixed with an empty row": [(20, 20), (0, 0), (19, 3)],
}
HEADS = [(4, 4, 16), (6, 2, 20), (7, 1, 64)]  # (num_heads, num_kv_heads, head_dim): MHA, GQA, an odd group
CASES = [*((heads, None) for heads in HEADS), (HEADS[0], 1), (HEADS[1], 9), (HEADS[2], 21)]


def make(
    batch: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[PagedBatch, torch.Tensor, torch.Tensor]:
    num_heads, num_kv_heads, head_dim = heads
    paged = make_paged_batch([n for n, _ in batch], num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    cu_seqlens_q = torch.tensor([0, *(q_len for _, q_len in batch)]).cumsum(0).int()
    # The first heads of a wider projection: strided over tokens.
    q = torch.randn(int(cu_seqlens_q[-1]), num_heads + 3, head_dim).to(dtype)[:, :num_heads]
    return paged, q, cu_seqlens_q


@pytest.mark.parametrize(("heads", "window"), CASES)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_it_equals_its_reference(
    batch: list[tuple[int, int]], heads: tuple[int, int, int], window: int | None, backend: str
) -> None:
    paged, q, cu_seqlens_q = make(batch, heads, torch.float32)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, cu_seqlens_q, paged.seq_lens, 0.3, window)
    with use_backend(backend):
        out = prefill_attention(*args)
    assert_close(out, prefill_attention_ref(*args), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()


@pytest.mark.parametrize("window", [None, 11])
def test_every_dtype(window: int | None, backend: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    paged, q, cu_seqlens_q = make([(20, 20), (35, 6)], (6, 2, 32), dtype)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, cu_seqlens_q, paged.seq_lens, 32**-0.5, window)
    with use_backend(backend):
        out = prefill_attention(*args)
    assert out.dtype is dtype
    assert_close(out, prefill_attention_ref(*args), **tolerance)


@pytest.mark.parametrize(("context", "q_len"), [(700, 700), (700, 300), (513, 257)])
@pytest.mark.parametrize("window", [None, 100])
def test_prompts_of_several_query_blocks(context: int, q_len: int, window: int | None) -> None:
    """The torch path takes long prompts in blocks of queries."""
    paged, q, cu_seqlens_q = make([(context, q_len)], (2, 1, 8), torch.float32)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, cu_seqlens_q, paged.seq_lens, 0.3, window)
    with use_backend("torch"):
        out = prefill_attention(*args)
    assert_close(out, prefill_attention_ref(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("context", "q_len"), [(33, 33), (40, 7)])
@pytest.mark.parametrize("window", [None, 5])
def test_the_reference_equals_torch(context: int, q_len: int, window: int | None) -> None:
    paged, q, cu_seqlens_q = make([(context, q_len)], (6, 2, 16), torch.float32)
    out = prefill_attention_ref(
        q, paged.k_cache, paged.v_cache, paged.block_tables, cu_seqlens_q, paged.seq_lens, 0.3, window
    )
    distance = torch.arange(context - q_len, context)[:, None] - torch.arange(context)
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    heads_first = [x.transpose(0, 1)[None] for x in (q, paged.k[0], paged.v[0])]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, scale=0.3, enable_gqa=True)
    assert_close(out, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_block_size_need_not_divide_a_tile(backend: str) -> None:
    paged = make_paged_batch([37], num_kv_heads=2, head_dim=8, block_size=5)
    q = torch.randn(20, 4, 8)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, torch.tensor([0, 20]).int(), paged.seq_lens, 0.3)
    with use_backend(backend):
        assert_close(prefill_attention(*args), prefill_attention_ref(*args), rtol=1e-5, atol=1e-5)
