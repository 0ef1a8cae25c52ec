"""The paged KV cache: one tensor whose blocks hold all layers, so that a block is one contiguous run of bytes.

Shape [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]; K at index 0 of the third axis, V at 1. A layer's
caches are views strided over blocks; they are what the attention kernels read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from baton.services.core.errors import ConfigurationError
from baton.services.engine.config import ModelConfig
from baton.services.engine.dtypes import dtype_name
from baton.services.engine.progress import StepProgress

BLOCK_ORDER = "layer,kv,token,head,dim"


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """Everything that two workers must agree on before they exchange blocks."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, dtype: torch.dtype) -> KVCacheShape:
        return cls(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def order(self) -> str:
        """Order of the axes inside a block."""
        return BLOCK_ORDER

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return math.prod(self.block_shape) * self.dtype.itemsize

    def num_blocks_in(self, num_bytes: int) -> int:
        """How many blocks fit into ``num_bytes``. Raises ConfigurationError when not even one does."""
        num_blocks = num_bytes // self.block_bytes
        if num_blocks < 1:
            raise ConfigurationError(
                f"kv cache memory: {num_bytes} bytes hold no block of {self.block_bytes} bytes "
                f"({self.block_size} tokens x {self.num_layers} layers, {self.dtype_name}); give it more"
            )
        return num_blocks


class KVCache:
    """The cache of one worker. ``layers[i]`` is (K, V), each [num_blocks, block_size, num_kv_heads, head_dim]."""

    def __init__(
        self,
        shape: KVCacheShape,
        num_blocks: int,
        *,
        device: torch.device,
        memory: torch.Tensor | None = None,
    ) -> None:
        """``memory``: bytes (uint8, contiguous, on ``device``) to lay the cache in, at least ``num_blocks`` blocks long;
        they stay the caller's. None: allocated here, zeroed.
        """
        num_bytes = num_blocks * shape.block_bytes
        if memory is None:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise ValueError(f"cache memory must be contiguous uint8, found {memory.dtype} {tuple(memory.shape)}")
        if memory.numel() < num_bytes or memory.device.type != device.type:
            raise ValueError(
                f"cache memory: {memory.numel()} bytes on {memory.device.type}, need {num_bytes} on {device.type}"
            )
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = shape.block_size
        self.progress = StepProgress()  # here, since every layer of every family comes by
        self.tensor = memory[:num_bytes].view(shape.dtype).view(num_blocks, *shape.block_shape)
        self.layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = tuple(
            (self.tensor[:, layer, 0], self.tensor[:, layer, 1]) for layer in range(shape.num_layers)
        )
