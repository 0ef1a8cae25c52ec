"""Launch parameters of the kernels, apart from the kernels: one table per op, one row per architecture.

A row is a list of (largest head_dim, largest element size, parameters); the first that covers a call is taken. The
values are pinned, so that a kernel's order of summation, and with it its last bits, does not depend on what ran before.
``python -m baton.kernels.gpu_check --tune`` times the candidates below on the GPU at hand and prints the best;
RESULTS.md has what it printed, and which rows were compared with the references on which GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from baton.kernels.launch import INTERPRETED

__all__ = [
    "AttentionTiles",
    "attention_candidates",
    "attention_tiles",
    "num_warps_for_row",
    "override",
    "target_programs",
]


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Tiles of an attention kernel."""

    block_m: int  # rows of queries: query tokens times query heads per KV head
    block_n: int  # keys
    num_warps: int
    num_stages: int


_Row = tuple[tuple[int, int, AttentionTiles], ...]

# The interpreter's tiles are small, so that modest test shapes cross every boundary.
_INTERPRETER = "interpreter"
_DEFAULT = "default"
_HOPPER = "sm9"

_PREFILL: dict[str, _Row] = {
    _INTERPRETER: ((256, 4, AttentionTiles(16, 16, 1, 1)),),
    _HOPPER: (
        (64, 2, AttentionTiles(128, 64, 4, 3)),
        (128, 2, AttentionTiles(128, 128, 8, 2)),
        (256, 2, AttentionTiles(64, 64, 8, 2)),
        (256, 4, AttentionTiles(32, 32, 4, 2)),
    ),
    _DEFAULT: (
        (64, 2, AttentionTiles(128, 64, 4, 3)),
        (128, 2, AttentionTiles(64, 64, 4, 3)),
        (256, 2, AttentionTiles(64, 32, 4, 2)),
        (256, 4, AttentionTiles(32, 32, 4, 2)),
    ),
}

# block_m is the least number of query heads a program pads to: the tensor cores' 16 rows. Looking up a tile's block ids
# takes a pipeline stage of its own, so five stages hold two tiles of keys and values.
_DECODE: dict[str, _Row] = {
    _INTERPRETER: ((256, 4, AttentionTiles(16, 16, 1, 1)),),
    _HOPPER: (
        (128, 2, AttentionTiles(16, 128, 4, 3)),
        (256, 2, AttentionTiles(16, 64, 4, 3)),
        (256, 4, AttentionTiles(16, 32, 4, 3)),
    ),
    _DEFAULT: (
        (128, 2, AttentionTiles(16, 64, 4, 3)),
        (256, 2, AttentionTiles(16, 32, 4, 2)),
        (256, 4, AttentionTiles(16, 32, 4, 2)),
    ),
}

_TABLES = {"prefill": _PREFILL, "decode": _DECODE}
_overrides: dict[str, AttentionTiles] = {}


@cache
def _architecture(device: torch.device) -> str:
    if INTERPRETED:
        return _INTERPRETER
    major = torch.cuda.get_device_capability(device)[0]
    return _HOPPER if major == 9 and torch.version.hip is None else _DEFAULT


def attention_tiles(op: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> AttentionTiles:
    """The tiles of ``op`` ("prefill" or "decode"). Raises ValueError for a head_dim beyond the table."""
    if op in _overrides:
        return _overrides[op]
    for max_head_dim, max_itemsize, tiles in _TABLES[op][_architecture(device)]:
        if head_dim <= max_head_dim and dtype.itemsize <= max_itemsize:
            return tiles
    raise ValueError(f"head_dim {head_dim} ({dtype}) is larger than any in the tuning table of {op} attention")


def override(op: str, tiles: AttentionTiles | None) -> None:
    """Use ``tiles`` for ``op`` whatever the table says, or the table again with None: for tuning and tests."""
    if tiles is None:
        _overrides.pop(op, None)
    else:
        _overrides[op] = tiles


def attention_candidates(op: str, head_dim: int, dtype: torch.dtype) -> Iterator[AttentionTiles]:
    """The tiles worth timing: those whose keys and values fit the shared memory of a Hopper multiprocessor."""
    shared_memory_bytes = 227 * 1024
    rows = (64, 128) if op == "prefill" else (16,)
    for block_m, block_n, num_warps, num_stages in product(rows, (32, 64, 128), (4, 8), (2, 3, 5)):
        tiles_bytes = (block_m + 2 * block_n * num_stages) * head_dim * dtype.itemsize
        if tiles_bytes <= shared_memory_bytes:
            yield AttentionTiles(block_m, block_n, num_warps, num_stages)


@cache
def target_programs(device: torch.device) -> int:
    """How many programs fill the device: decode attention splits long contexts until there are this many."""
    if device.type != "cuda":
        return 8  # the interpreter: enough for tests to see several splits
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def num_warps_for_row(num_elements: int) -> int:
    """Warps of a program that holds a whole row: about 16 elements a thread."""
    return min(16, max(1, num_elements // 512))
