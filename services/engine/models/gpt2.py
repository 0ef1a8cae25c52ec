"""GPT-2: learned positions, layer norm first, fused query-key-value, weights saved transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.services.engine import config as config_module
from baton.services.engine.batch import ForwardBatch
from baton.services.engine.config import GenerationDefaults, ModelConfig
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.kv_cache import KVCache
from baton.services.engine.layers import ACTIVATIONS, LayerNorm, PagedAttention, load_conv1d, load_head
from baton.services.engine.models.base import ModelFamily, WeightSource

_PREFIX = "transformer."


class Gpt2Layer:
    """One block: attention and MLP, each behind a layer norm."""

    def __init__(self, config: ModelConfig, source: WeightSource, index: int) -> None:
        name, hidden = f"{_PREFIX}h.{index}", config.hidden_size
        self.num_heads = config.num_heads
        self.attention_norm = LayerNorm(source, f"{name}.ln_1", hidden, config.norm_eps)
        self.qkv = load_conv1d(source, f"{name}.attn.c_attn", 3 * hidden, hidden)
        self.attention = PagedAttention(config, index)
        self.output = load_conv1d(source, f"{name}.attn.c_proj", hidden, hidden)
        self.mlp_norm = LayerNorm(source, f"{name}.ln_2", hidden, config.norm_eps)
        self.up = load_conv1d(source, f"{name}.mlp.c_fc", config.intermediate_size, hidden)
        self.activation = ACTIVATIONS[config.activation]
        self.down = load_conv1d(source, f"{name}.mlp.c_proj", hidden, config.intermediate_size)

    def forward(self, x: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], of the output rows only in the last layer."""
        q, k, v = self.qkv(self.attention_norm(x)).view(len(x), 3, self.num_heads, -1).unbind(1)
        attended = self.output(self.attention(q, k, v, batch, cache))
        x = (batch.select_outputs(x) if self.attention.is_last else x) + attended
        return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class Gpt2:
    """Token and position embeddings, layers, final norm, output projection."""

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        self.config = config
        hidden = config.hidden_size
        self.embedding = source.tensor(f"{_PREFIX}wte.weight", config.vocab_size, hidden)
        self.positions = source.tensor(f"{_PREFIX}wpe.weight", config.max_position_embeddings, hidden)
        self.layers = [Gpt2Layer(config, source, index) for index in range(config.num_layers)]
        self.norm = LayerNorm(source, f"{_PREFIX}ln_f", hidden, config.norm_eps)
        self.head = load_head(source, config, self.embedding, "lm_head")

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        x = F.embedding(batch.token_ids, self.embedding) + F.embedding(batch.positions, self.positions)
        for layer in self.layers:
            x = layer.forward(x, batch, cache)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def read_config(raw: ConfigFile, generation: GenerationDefaults) -> ModelConfig:
    raw.require("add_cross_attention", False)
    shape = config_module.read_attention_shape(raw, layers="n_layer", hidden="n_embd", heads="n_head", kv_heads=None)
    vocab_size = raw.integer("vocab_size", maximum=config_module.MAX_VOCAB)
    scale = shape.head_dim**-0.5 if raw.boolean("scale_attn_weights", default=True) else 1.0
    by_layer = raw.boolean("scale_attn_by_inverse_layer_idx", default=False)
    return ModelConfig(
        architecture=config_module.read_architecture(raw),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=raw.integer("n_inner", default=4 * shape.hidden_size, maximum=4 * config_module.MAX_WIDTH),
        vocab_size=vocab_size,
        max_position_embeddings=raw.integer("n_positions", maximum=config_module.MAX_POSITIONS),
        norm_eps=raw.number("layer_norm_epsilon", default=1e-5, minimum=0.0, maximum=1.0),
        activation=raw.choice("activation_function", frozenset(ACTIVATIONS), default="gelu_new"),
        tie_word_embeddings=raw.boolean("tie_word_embeddings", default=True),
        sliding_windows=(None,) * shape.num_layers,
        attention_scales=tuple(scale / (layer + 1 if by_layer else 1) for layer in range(shape.num_layers)),
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        dtype=config_module.read_dtype(raw),
        eos_token_ids=config_module.read_eos_token_ids(raw, generation, vocab_size),
        generation=generation,
    )


# The causal mask was saved as a tensor once.
FAMILY = ModelFamily("GPT2LMHeadModel", read_config, Gpt2, _PREFIX, ("*.attn.bias", "*.attn.masked_bias"))
