"""Qwen2 and Qwen2.5: Llama's decoder with biases on query, key and value, and sliding windows by layer."""

from __future__ import annotations

from baton.services.engine.config import MAX_LAYERS, GenerationDefaults, ModelConfig, read_layer_windows
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.models.base import ModelFamily
from baton.services.engine.models.rotary_decoder import IGNORED_WEIGHTS, PREFIX, RotaryDecoder, read_rotary_config


def read_config(raw: ConfigFile, generation: GenerationDefaults) -> ModelConfig:
    num_layers = raw.integer("num_hidden_layers", maximum=MAX_LAYERS)
    return read_rotary_config(raw, generation, qkv_bias=True, sliding_windows=read_layer_windows(raw, num_layers))


FAMILY = ModelFamily("Qwen2ForCausalLM", read_config, RotaryDecoder, PREFIX, IGNORED_WEIGHTS)
