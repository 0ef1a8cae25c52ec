"""decode_attention, its split over programs, and the batching of the torch path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.paged_cache import PagedBatch, make_paged_batch
from torch.testing import assert_close

from baton.kernels import decode_attention, plan_decode, tuning, use_backend
from baton.kernels.decode_attention import decode_attention_ref

BATCHES = {
    "one token": [1],
    "block borders": [15, 16, 17],
    "alike": [20, 20, 20],
    "with an empty row": [3, 0, 33],
    "one long": [150, 2],
}
HEADS = [(4, 4, 16), (6, 2, 20), (17, 1, 64)]  # (num_heads, num_kv_heads, head_dim): MHA, GQA, more than 16 in a group
CASES = [*((heads, None) for heads in HEADS), (HEADS[0], 1), (HEADS[1], 18)]


def make(seq_lens: list[int], heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[PagedBatch, torch.Tensor]:
    num_heads, num_kv_heads, head_dim = heads
    paged = make_paged_batch(seq_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    return paged, torch.randn(len(seq_lens), num_heads + 3, head_dim).to(dtype)[:, :num_heads]


@pytest.mark.parametrize(("heads", "window"), CASES)
@pytest.mark.parametrize("seq_lens", BATCHES.values(), ids=BATCHES)
def test_it_equals_its_reference(
    seq_lens: list[int], heads: tuple[int, int, int], window: int | None, backend: str
) -> None:
    paged, q = make(seq_lens, heads, torch.float32)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, paged.seq_lens, 0.3, window)
    with use_backend(backend):
        out = decode_attention(*args)
    assert_close(out, decode_attention_ref(*args), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()


@pytest.mark.parametrize("window", [None, 11])
def test_every_dtype(window: int | None, backend: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    paged, q = make([20, 35, 9], (6, 2, 32), dtype)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, paged.seq_lens, 32**-0.5, window)
    with use_backend(backend):
        out = decode_attention(*args)
    assert out.dtype is dtype
    assert_close(out, decode_attention_ref(*args), **tolerance)


@pytest.mark.parametrize("window", [None, 700])
def test_splits_merge_to_the_whole(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long sequence beside one that leaves most of its shares without a key."""
    pytest.importorskip("triton")
    from baton.kernels import decode_attention as op  # the function

    monkeypatch.setitem(op.__globals__, "target_programs", lambda device: 64)
    paged, q = make([900, 3], (2, 1, 16), torch.float32)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, paged.seq_lens, 0.3, window)
    with use_backend("triton"):
        out = decode_attention(*args)
    assert_close(out, decode_attention_ref(*args), rtol=1e-5, atol=1e-5)


def test_other_tiles_give_the_same() -> None:
    pytest.importorskip("triton")
    paged, q = make([70, 33], (3, 1, 16), torch.float32)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, paged.seq_lens, 0.3)
    tuning.override("decode", tuning.AttentionTiles(32, 64, 1, 1))
    try:
        with use_backend("triton"):
            out = decode_attention(*args)
    finally:
        tuning.override("decode", None)
    assert_close(out, decode_attention_ref(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_the_reference_equals_torch(window: int | None) -> None:
    paged, q = make([1, 100], (6, 2, 16), torch.float32)
    out = decode_attention_ref(q, paged.k_cache, paged.v_cache, paged.block_tables, paged.seq_lens, 0.3, window)
    for b in range(2):
        keys = slice(None) if window is None else slice(-window, None)
        k, v = (x[b][keys].transpose(0, 1)[None] for x in (paged.k, paged.v))
        expected = F.scaled_dot_product_attention(q[b][None, :, None], k, v, scale=0.3, enable_gqa=True)
        assert_close(out[b], expected[0, :, 0], rtol=1e-5, atol=1e-5)


# ---- the torch path's batching


MIXED = [1, 300, 310, 5, 0, 2000, 305, 16, 17, 900]


@pytest.mark.parametrize("window", [None, 3, 64, 1000])
def test_a_mixed_batch_is_grouped_without_changing_it(window: int | None) -> None:
    paged, q = make(MIXED, (6, 2, 16), torch.float32)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, paged.seq_lens, 0.3, window)
    with use_backend("torch"):
        out = decode_attention(*args)
        plan = plan_decode(paged.block_tables, paged.seq_lens, 16, window)
        assert torch.equal(decode_attention(*args, plan=plan), out)
    assert_close(out, decode_attention_ref(*args), rtol=1e-5, atol=1e-5)


def test_every_row_with_keys_is_in_one_group() -> None:
    paged, _ = make(MIXED, (1, 1, 1), torch.float32)
    plan = plan_decode(paged.block_tables, paged.seq_lens, 16)
    rows = torch.cat([group.rows for group in plan.groups]).tolist()
    assert sorted(rows) == [b for b, length in enumerate(MIXED) if length > 0]


def test_groups_pad_little() -> None:
    """Many short sequences are one group; a long one is not padded to, nor does it pad others."""
    paged, _ = make([20] * 30 + [3000], (1, 1, 1), torch.float32)
    plan = plan_decode(paged.block_tables, paged.seq_lens, 16)
    assert [len(group.rows) for group in plan.groups] == [30, 1]
    assert [group.num_columns for group in plan.groups] == [20, 3000]
    assert all(group.bias is None and group.stale is None for group in plan.groups)


def test_a_plan_for_another_window_is_not_used() -> None:
    paged, q = make([40, 9], (2, 2, 8), torch.float32)
    plan = plan_decode(paged.block_tables, paged.seq_lens, 16, sliding_window=4)
    args = (q, paged.k_cache, paged.v_cache, paged.block_tables, paged.seq_lens, 0.3)
    with use_backend("torch"):
        assert_close(decode_attention(*args, plan=plan), decode_attention_ref(*args), rtol=1e-5, atol=1e-5)


def test_an_empty_batch(backend: str) -> None:
    paged = make_paged_batch([3], num_kv_heads=2, head_dim=8)
    with use_backend(backend):
        out = decode_attention(
            torch.empty(0, 4, 8), paged.k_cache, paged.v_cache, paged.block_tables[:0], paged.seq_lens[:0], 0.3
        )
    assert out.shape == (0, 4, 8)
