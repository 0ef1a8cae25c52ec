"""Linear layers on CPU: weights laid out once, at load, for the matrix library.

oneDNN multiplies fastest from its own blocked layout; ``torch.nn.functional.linear`` converts to it in every call. And
a CPU without 16-bit matrix instructions multiplies bfloat16 and float16 through slow generic loops. ``pack_linear``
picks, for a weight's dtype and this CPU, what ``RESULTS.md`` shows to be the fastest:

==================================  ==================================================================================
float32, or a 16-bit dtype the CPU  oneDNN with the weight packed (replaces the plain copy of it)
multiplies natively
other 16-bit dtypes                 one or two rows: the plain product, bound by reading the weight; more rows: the
                                    weight is widened to float32 tile by tile, so that memory stays that of 16 bits
a weight that is not on a CPU       ``torch.nn.functional.linear``
==================================  ==================================================================================

``BATON_PACK_LINEAR=0`` switches it off: every layer is then ``torch.nn.functional.linear``.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

from baton.kernels.paging import cpu_computes_in

__all__ = ["Linear", "pack_linear"]

Linear = Callable[[torch.Tensor], torch.Tensor]  # [..., in_features] -> [..., out_features]

# Of a widened tile: 2 MiB of float32, which stays in L2 or L3 between widening and multiplying.
_TILE_ELEMENTS = 1 << 19
_MAX_PLAIN_ROWS = 2


def pack_linear(
    weight: torch.Tensor,  # [out_features, in_features]
    bias: torch.Tensor | None = None,  # [out_features]
) -> Linear:
    """``x -> x @ weight.T + bias`` in the fastest form for this device and dtype.

    The packed form keeps a copy of its own: drop ``weight`` afterwards unless it is used elsewhere.
    """
    if weight.device.type != "cpu" or os.environ.get("BATON_PACK_LINEAR", "1") == "0":
        return _plain(weight, bias)
    if not torch._C._has_mkldnn:
        return _plain(weight, bias)
    if weight.dtype is torch.float32 or cpu_computes_in(weight.dtype):
        return _packed(weight, bias)
    return _widened(weight, bias)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return lambda x: F.linear(x, weight, bias)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    multiply = torch.ops.mkldnn._linear_pointwise

    def linear(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = multiply(x, packed, bias, "none", [], "")
        return result

    return linear


def _widened(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    out_features, in_features = weight.shape
    tiles = torch.split(weight, max(1, _TILE_ELEMENTS // in_features))

    def linear(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, in_features)
        if rows.shape[0] <= _MAX_PLAIN_ROWS:
            return F.linear(x, weight, bias)
        wide = rows.float()
        out = torch.empty((rows.shape[0], out_features), dtype=torch.float32)
        begin = 0
        for tile in tiles:
            torch.mm(wide, tile.float().t(), out=out[:, begin : begin + len(tile)])
            begin += len(tile)
        if bias is not None:
            out += bias
        return out.to(x.dtype).view(*x.shape[:-1], out_features)

    return linear
