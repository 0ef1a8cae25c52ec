"""The model that the gateway answers for: its names, limits, end-of-sequence ids and default sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from baton.services.core.errors import BatonError, ConfigurationError, ErrorCode

_MAX_NAME_CHARS_SHOWN = 64


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling where the request is silent: the model's generation_config.json, else neutral."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> GenerationDefaults:
        """Takes the known keys; absent and null ones stay neutral. ``top_k`` below 1 is off."""
        known = {name: config[name] for name in cls.__slots__ if config.get(name) is not None}
        bad = [name for name, value in known.items() if isinstance(value, bool) or not isinstance(value, int | float)]
        if bad:
            raise ConfigurationError(f"generation_config.json: {bad[0]} must be a number, got {known[bad[0]]!r}")
        if "top_k" in known:
            known["top_k"] = max(0, int(known["top_k"]))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a request can name, and what it gets. ``max_model_len`` is prompt + output, in tokens."""

    name: str
    max_model_len: int
    vocab_size: int
    aliases: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    created: int = 0  # seconds since 1970

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may use, the main one first."""
        return (self.name, *self.aliases)

    def resolve(self, asked: str | None) -> str:
        """The name to answer with: the one asked for, or the main one. Raises MODEL_NOT_FOUND."""
        if asked is None:
            return self.name
        if asked in self.names:
            return asked
        shown = asked if len(asked) <= _MAX_NAME_CHARS_SHOWN else asked[:_MAX_NAME_CHARS_SHOWN] + "..."
        raise BatonError(ErrorCode.MODEL_NOT_FOUND, f"The model {shown!r} does not exist.", param="model")


def read_generation_config(folder: Path) -> tuple[GenerationDefaults, frozenset[int]]:
    """Default sampling and end-of-sequence ids of a model folder. Raises ConfigurationError for a damaged file.

    End-of-sequence ids are those of generation_config.json, else config.json's. The tokenizer may add its own.
    """
    generation = _read_json(folder / "generation_config.json")
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = _read_json(folder / "config.json").get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 for token_id in ids):
        raise ConfigurationError(f"{folder}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return GenerationDefaults.from_generation_config(generation), frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a JSON object")
    return content
