"""Qwen3 (dense): Llama's decoder with RMS norms on each head's query and key, and head_dim set apart from the width."""

from __future__ import annotations

from baton.services.engine.config import MAX_LAYERS, GenerationDefaults, ModelConfig, read_layer_windows
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.models.base import ModelFamily
from baton.services.engine.models.rotary_decoder import IGNORED_WEIGHTS, PREFIX, RotaryDecoder, read_rotary_config

_DEFAULT_HEAD_DIM = 128  # when config.json does not say


def read_config(raw: ConfigFile, generation: GenerationDefaults) -> ModelConfig:
    num_layers = raw.integer("num_hidden_layers", maximum=MAX_LAYERS)
    attention_bias = raw.boolean("attention_bias", default=False)
    return read_rotary_config(
        raw,
        generation,
        default_head_dim=_DEFAULT_HEAD_DIM,
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        qk_norm=True,
        sliding_windows=read_layer_windows(raw, num_layers),
    )


FAMILY = ModelFamily("Qwen3ForCausalLM", read_config, RotaryDecoder, PREFIX, IGNORED_WEIGHTS)
