"""The two sources that a model is built from: one that writes down what it asks for, one that hands out a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from baton.services.core.errors import ConfigurationError
from baton.services.engine.checkpoint import Checkpoint
from baton.services.engine.config import ModelConfig
from baton.services.engine.models.base import CausalLM, ModelFamily


class RecordingSource:
    """Hands out tensors without memory and notes their names and shapes in ``required``."""

    def __init__(self) -> None:
        self.required: dict[str, tuple[int, ...]] = {}

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        self.required[name] = shape
        return torch.empty(shape, device="meta")


class CheckpointSource:
    """Streams tensors out of safetensors files, one at a time: the peak is the model plus the largest fused weight."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        info = self._checkpoint.find(name)
        if info is None or info.shape != shape:
            raise ValueError(f"tensor {name!r} was asked for, but not when the checkpoint was checked")
        try:
            if info.path not in self._files:
                self._files[info.path] = safe_open(info.path, framework="pt", device="cpu")
            mapped: torch.Tensor = self._files[info.path].get_tensor(info.name)
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"{info.path}: tensor {info.name!r}: cannot be read: {error}") from error
        # A copy, always: the file may be replaced under a running server.
        return mapped.to(device=self._device, dtype=self._dtype, copy=True)


def required_weights(family: ModelFamily, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that this model asks for: name -> shape. Takes no memory for them."""
    source = RecordingSource()
    family.build(config, source)
    return source.required


def build_model(
    family: ModelFamily, config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> CausalLM:
    """The model with its weights. The checkpoint must have passed its check."""
    with CheckpointSource(checkpoint, dtype, device) as source:
        return family.build(config, source)
