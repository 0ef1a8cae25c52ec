"""pack_linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from baton.kernels import linear, pack_linear


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (40,), (0,), (2, 5)], ids=str)
def test_it_equals_the_product(
    shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_TILE_ELEMENTS", 33 * 10)  # several tiles, the last one smaller
    weight = (torch.randn(47, 33) / 6).to(dtype)
    bias = torch.randn(47).to(dtype) if with_bias else None
    x = torch.randn(*shape, 33).to(dtype)
    out = pack_linear(weight, bias)(x)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)
    assert out.dtype is dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_the_switch_gives_the_plain_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_PACK_LINEAR", "0")
    weight, x = torch.randn(8, 5).to(dtype), torch.randn(3, 5).to(dtype)
    assert torch.equal(pack_linear(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("native", [True, False])
def test_the_form_follows_the_cpu(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is always packed; 16 bits are where the CPU multiplies them and widened where it does not."""
    packed: list[torch.dtype] = []
    monkeypatch.setattr(linear, "cpu_computes_in", lambda dtype: native)
    monkeypatch.setattr(linear, "_packed", lambda weight, bias: packed.append(weight.dtype))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pack_linear(torch.zeros(2, 2, dtype=dtype))
    assert packed == ([torch.float32, torch.bfloat16, torch.float16] if native else [torch.float32])
