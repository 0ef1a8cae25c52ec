from __future__ import annotations

import dataclasses

import pytest

from baton.kvtransfer.layout import Compatibility, KVLayout, mismatch

LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16")


def test_block_bytes_are_all_layers_keys_and_values() -> None:
    assert LAYOUT.block_bytes == 30 * 2 * 16 * 3 * 64 * 2
    assert dataclasses.replace(LAYOUT, dtype="float32").block_bytes == 2 * LAYOUT.block_bytes
    assert LAYOUT.block_shape == (30, 2, 16, 3, 64)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (700, 44)])
def test_a_partly_filled_block_counts_as_one(num_tokens: int, num_blocks: int) -> None:
    assert LAYOUT.num_blocks(num_tokens) == num_blocks


def test_equal_descriptions_match() -> None:
    assert mismatch(Compatibility("f", LAYOUT), Compatibility("f", dataclasses.replace(LAYOUT))) is None


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("num_layers", 31),
        ("num_kv_heads", 4),
        ("head_dim", 128),
        ("block_size", 32),
        ("dtype", "float16"),
        ("order", "kv,layer,token,head,dim"),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(field: str, other: object) -> None:
    ours = Compatibility("f", LAYOUT)
    theirs = Compatibility("f", dataclasses.replace(LAYOUT, **{field: other}))  # type: ignore[arg-type]
    assert mismatch(ours, theirs) == f"KV {field}: {getattr(LAYOUT, field)!r} here, {other!r} there"


def test_every_difference_is_named() -> None:
    message = mismatch(Compatibility("f", LAYOUT), Compatibility("g", dataclasses.replace(LAYOUT, head_dim=9)))
    assert message == "model fingerprint: 'f' here, 'g' there; KV head_dim: 64 here, 9 there"


@pytest.mark.parametrize(("field", "value"), [("dtype", "float8"), ("num_layers", 0), ("head_dim", -1)])
def test_an_impossible_layout_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(value)):
        dataclasses.replace(LAYOUT, **{field: value})  # type: ignore[arg-type]
