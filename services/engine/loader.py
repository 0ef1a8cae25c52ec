"""Loads a model: folder or hub id in, runnable model out. Everything is checked before memory is taken."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from baton.services.engine.checkpoint import Checkpoint
from baton.services.engine.config import ModelConfig
from baton.services.engine.dtypes import resolve_device, resolve_dtype
from baton.services.engine.model_folder import check_tokenizer, resolve_model_folder
from baton.services.engine.models.base import CausalLM
from baton.services.engine.models.registry import read_model_config
from baton.services.engine.weights import build_model, required_weights

# Fields that do not change what the layers compute.
_NOT_IN_FINGERPRINT = frozenset({"dtype", "eos_token_ids", "generation"})


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory. ``fingerprint`` (32 hex digits) is equal exactly where KV blocks mean the same."""

    config: ModelConfig
    model: CausalLM
    dtype: torch.dtype
    device: torch.device
    tokenizer_path: Path
    fingerprint: str


def load_model(
    path_or_id: str | Path, *, dtype: str = "auto", device: str = "auto", require_tokenizer: bool = True
) -> LoadedModel:
    """Load a Hugging Face model folder, or a hub id where there is a network.

    ``dtype``: "auto" (the checkpoint's, or float32 where the device is slow in it), "float32", "bfloat16", "float16".
    ``device``: "auto", "cpu", "cuda". Raises ConfigurationError naming file, tensor or field, expected and found.
    """
    folder = resolve_model_folder(str(path_or_id))
    family, config = read_model_config(folder)
    if require_tokenizer:
        check_tokenizer(folder, config.vocab_size)
    checkpoint = Checkpoint.open(folder, family.base_prefix)
    required = required_weights(family, config)
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    checkpoint.check(required, family.ignored_weights + tied)
    resolved_device = resolve_device(device)
    resolved_dtype = resolve_dtype(dtype, config.dtype, resolved_device)
    with torch.inference_mode():
        model = build_model(family, config, checkpoint, resolved_dtype, resolved_device)
    return LoadedModel(
        config=config,
        model=model,
        dtype=resolved_dtype,
        device=resolved_device,
        tokenizer_path=folder,
        fingerprint=_fingerprint(config, checkpoint.digest(list(required))),
    )


def _fingerprint(config: ModelConfig, weights: bytes) -> str:
    digest = hashlib.blake2b(weights, digest_size=16)
    for field in fields(config):
        if field.name not in _NOT_IN_FINGERPRINT:
            digest.update(f"{field.name}={getattr(config, field.name)!r};".encode())
    return digest.hexdigest()
