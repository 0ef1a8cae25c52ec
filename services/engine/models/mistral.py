"""Mistral: Llama's decoder, every layer looking back over one sliding window (newer ones: over everything)."""

from __future__ import annotations

from baton.services.engine.config import MAX_LAYERS, GenerationDefaults, ModelConfig
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.models.base import ModelFamily
from baton.services.engine.models.rotary_decoder import IGNORED_WEIGHTS, PREFIX, RotaryDecoder, read_rotary_config


def read_config(raw: ConfigFile, generation: GenerationDefaults) -> ModelConfig:
    num_layers = raw.integer("num_hidden_layers", maximum=MAX_LAYERS)
    window = raw.optional_integer("sliding_window")
    return read_rotary_config(raw, generation, sliding_windows=(window,) * num_layers)


FAMILY = ModelFamily("MistralForCausalLM", read_config, RotaryDecoder, PREFIX, IGNORED_WEIGHTS)
