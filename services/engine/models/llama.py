"""Llama (1 to 3.3, and the many models saved as Llama)."""

from __future__ import annotations

from baton.services.engine.config import GenerationDefaults, ModelConfig
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.models.base import ModelFamily
from baton.services.engine.models.rotary_decoder import IGNORED_WEIGHTS, PREFIX, RotaryDecoder, read_rotary_config


def read_config(raw: ConfigFile, generation: GenerationDefaults) -> ModelConfig:
    attention_bias = raw.boolean("attention_bias", default=False)
    return read_rotary_config(
        raw,
        generation,
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=raw.boolean("mlp_bias", default=False),
    )


FAMILY = ModelFamily("LlamaForCausalLM", read_config, RotaryDecoder, PREFIX, IGNORED_WEIGHTS)
