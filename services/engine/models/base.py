"""What every model family provides, and what a model can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.services.engine.batch import ForwardBatch
from baton.services.engine.config import GenerationDefaults, ModelConfig
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.kv_cache import KVCache


class WeightSource(Protocol):
    """Hands out a checkpoint's tensors by name, in the dtype and on the device that the model runs in.

    A model's constructor is run twice: over a source that only writes down what is asked for (its tensors are on the meta
    device), so that the checkpoint can be checked before memory is taken; then over the checkpoint itself.
    """

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor ``name``, of exactly this shape. The caller owns it."""
        ...


class CausalLM(Protocol):
    """A decoder-only transformer over the paged cache."""

    config: ModelConfig

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Run one step; stores K and V of every token. Returns [R, hidden] of the output rows, ready for ``logits``."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab_size], in the model's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One architecture: how its config is read, how it is built, how its checkpoints name things."""

    architecture: str
    read_config: Callable[[ConfigFile, GenerationDefaults], ModelConfig]
    build: Callable[[ModelConfig, WeightSource], CausalLM]
    base_prefix: str  # checkpoints saved from the model without its head leave this out of their names
    ignored_weights: tuple[str, ...] = ()  # fnmatch patterns of tensors that carry nothing learned
