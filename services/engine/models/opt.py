"""OPT: learned positions from 2 on, layer norm before or (350M) after, embedding table possibly narrower than the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton.services.engine import config as config_module
from baton.services.engine.batch import ForwardBatch
from baton.services.engine.config import GenerationDefaults, ModelConfig
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.kv_cache import KVCache
from baton.services.engine.layers import (
    ACTIVATIONS,
    LayerNorm,
    PagedAttention,
    load_fused_linear,
    load_head,
    load_linear,
)
from baton.services.engine.models.base import ModelFamily, WeightSource

_PREFIX = "model."
_DECODER = f"{_PREFIX}decoder"
_POSITION_OFFSET = 2  # the table's first two rows stood for padding in training
_NORM_EPS = 1e-5  # not in config.json


class OptLayer:
    """One block: attention and MLP, each behind (or, in the 350M model, before) a layer norm."""

    def __init__(self, config: ModelConfig, source: WeightSource, index: int) -> None:
        name, hidden = f"{_DECODER}.layers.{index}", config.hidden_size
        self.num_heads = config.num_heads
        self.norm_first = config.norm_first
        self.attention_norm = LayerNorm(source, f"{name}.self_attn_layer_norm", hidden, config.norm_eps)
        self.qkv = load_fused_linear(
            source,
            [(f"{name}.self_attn.{part}_proj", hidden) for part in ("q", "k", "v")],
            hidden,
            bias=config.qkv_bias,
        )
        self.attention = PagedAttention(config, index)
        self.output = load_linear(
            source, f"{name}.self_attn.out_proj", hidden, hidden, bias=config.attention_output_bias
        )
        self.mlp_norm = LayerNorm(source, f"{name}.final_layer_norm", hidden, config.norm_eps)
        self.up = load_linear(source, f"{name}.fc1", config.intermediate_size, hidden, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.down = load_linear(source, f"{name}.fc2", hidden, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], of the output rows only in the last layer."""
        attended = self._attend(self.attention_norm(x) if self.norm_first else x, batch, cache)
        x = (batch.select_outputs(x) if self.attention.is_last else x) + attended
        if self.norm_first:
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x)
        return self.mlp_norm(x + self._mlp(x))

    def _attend(self, x: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)
        return self.output(self.attention(q, k, v, batch, cache))

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class Opt:
    """Token and position embeddings, layers, final norm if there is one, output projection."""

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        self.config = config
        hidden, width = config.hidden_size, config.embedding_size or config.hidden_size
        self.embedding = source.tensor(f"{_DECODER}.embed_tokens.weight", config.vocab_size, width)
        num_positions = config.max_position_embeddings + _POSITION_OFFSET
        self.positions = source.tensor(f"{_DECODER}.embed_positions.weight", num_positions, hidden)
        self.project_in = self.project_out = None
        if width != hidden:
            self.project_in = load_linear(source, f"{_DECODER}.project_in", hidden, width, bias=False)
            self.project_out = load_linear(source, f"{_DECODER}.project_out", width, hidden, bias=False)
        self.layers = [OptLayer(config, source, index) for index in range(config.num_layers)]
        self.norm = (
            LayerNorm(source, f"{_DECODER}.final_layer_norm", hidden, config.norm_eps) if config.final_norm else None
        )
        self.head = load_head(source, config, self.embedding, "lm_head")

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        x = F.embedding(batch.token_ids, self.embedding)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + F.embedding(batch.positions + _POSITION_OFFSET, self.positions)
        for layer in self.layers:
            x = layer.forward(x, batch, cache)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def read_config(raw: ConfigFile, generation: GenerationDefaults) -> ModelConfig:
    raw.require("layer_norm_elementwise_affine", True)
    shape = config_module.read_attention_shape(raw, kv_heads=None)
    vocab_size = raw.integer("vocab_size", maximum=config_module.MAX_VOCAB)
    bias = raw.boolean("enable_bias", default=True)
    norm_first = raw.boolean("do_layer_norm_before", default=True)
    return ModelConfig(
        architecture=config_module.read_architecture(raw),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=raw.integer("ffn_dim", maximum=config_module.MAX_WIDTH),
        vocab_size=vocab_size,
        max_position_embeddings=raw.integer("max_position_embeddings", maximum=config_module.MAX_POSITIONS),
        norm_eps=_NORM_EPS,
        activation=raw.choice("activation_function", frozenset(ACTIVATIONS), default="relu"),
        tie_word_embeddings=raw.boolean("tie_word_embeddings", default=True),
        sliding_windows=(None,) * shape.num_layers,
        attention_scales=shape.scales,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        norm_first=norm_first,
        final_norm=norm_first and not raw.boolean("_remove_final_layer_norm", default=False),
        embedding_size=raw.integer("word_embed_proj_dim", default=shape.hidden_size, maximum=config_module.MAX_WIDTH),
        dtype=config_module.read_dtype(raw),
        eos_token_ids=config_module.read_eos_token_ids(raw, generation, vocab_size),
        generation=generation,
    )


FAMILY = ModelFamily("OPTForCausalLM", read_config, Opt, _PREFIX)
