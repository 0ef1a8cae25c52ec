"""The decoder that Llama made common: RMS norm first, rotary positions, grouped-query attention, gated MLP.

The families that share it differ in switches of ``ModelConfig`` only; their files say which.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton import kernels
from baton.services.engine import config as config_module
from baton.services.engine.batch import ForwardBatch
from baton.services.engine.config import GenerationDefaults, ModelConfig
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.kv_cache import KVCache
from baton.services.engine.layers import (
    GATED_ACTIVATIONS,
    PagedAttention,
    RotaryTable,
    load_fused_linear,
    load_head,
    load_linear,
)
from baton.services.engine.models.base import WeightSource

PREFIX = "model."
IGNORED_WEIGHTS = ("*.rotary_emb.inv_freq",)


class RotaryDecoderLayer:
    """One block: attention and MLP, each behind a norm."""

    def __init__(self, config: ModelConfig, source: WeightSource, index: int) -> None:
        name = f"{PREFIX}layers.{index}"
        hidden, head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head_dim
        self.eps = config.norm_eps
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.sizes = (q_size, kv_size, kv_size)
        self.input_norm = source.tensor(f"{name}.input_layernorm.weight", hidden)
        self.qkv = load_fused_linear(
            source,
            (
                (f"{name}.self_attn.q_proj", q_size),
                (f"{name}.self_attn.k_proj", kv_size),
                (f"{name}.self_attn.v_proj", kv_size),
            ),
            hidden,
            bias=config.qkv_bias,
        )
        self.q_norm = source.tensor(f"{name}.self_attn.q_norm.weight", head_dim) if config.qk_norm else None
        self.k_norm = source.tensor(f"{name}.self_attn.k_norm.weight", head_dim) if config.qk_norm else None
        self.attention = PagedAttention(config, index)
        self.output = load_linear(source, f"{name}.self_attn.o_proj", hidden, q_size, bias=config.attention_output_bias)
        self.mlp_norm = source.tensor(f"{name}.post_attention_layernorm.weight", hidden)
        inner = config.intermediate_size
        self.gate_up = load_fused_linear(
            source, ((f"{name}.mlp.gate_proj", inner), (f"{name}.mlp.up_proj", inner)), hidden, bias=config.mlp_bias
        )
        self.activation = GATED_ACTIVATIONS[config.activation]
        self.down = load_linear(source, f"{name}.mlp.down_proj", hidden, inner, bias=config.mlp_bias)

    def forward(
        self,
        x: torch.Tensor,  # [T, hidden], what the layer before added
        residual: torch.Tensor | None,  # [T, hidden], the stream without x; None in the first layer
        cos_sin: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # the same two, of the output rows only after the last layer
        if residual is None:
            residual = x
            x = kernels.rms_norm(x, self.input_norm, self.eps)
        else:
            x, residual = kernels.fused_add_rms_norm(x, residual, self.input_norm, self.eps)
        q, k, v = self.qkv(x).split_with_sizes(self.sizes, dim=-1)
        q = q.view(-1, self.num_heads, self.head_dim)
        k = k.view(-1, self.num_kv_heads, self.head_dim)
        v = v.view(-1, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q = kernels.rms_norm(q, self.q_norm, self.eps)
            k = kernels.rms_norm(k, self.k_norm, self.eps)
        q, k = kernels.rotary_embedding(q, k, batch.positions, cos_sin)
        x = self.output(self.attention(q, k, v, batch, cache))
        if self.attention.is_last:
            residual = batch.select_outputs(residual)
        x, residual = kernels.fused_add_rms_norm(x, residual, self.mlp_norm, self.eps)
        return self.down(self.activation(self.gate_up(x))), residual


class RotaryDecoder:
    """Embedding, layers, final norm, output projection."""

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        self.config = config
        self.embedding = source.tensor(f"{PREFIX}embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [RotaryDecoderLayer(config, source, index) for index in range(config.num_layers)]
        self.norm = source.tensor(f"{PREFIX}norm.weight", config.hidden_size)
        self.head = load_head(source, config, self.embedding, "lm_head")
        self.rotary = RotaryTable(config, self.embedding.device)

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        x = F.embedding(batch.token_ids, self.embedding)
        residual: torch.Tensor | None = None
        cos_sin = self.rotary.up_to(batch.max_seq_len)
        for layer in self.layers:
            x, residual = layer.forward(x, residual, cos_sin, batch, cache)
        assert residual is not None
        return kernels.fused_add_rms_norm(x, residual, self.norm, self.config.norm_eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def read_rotary_config(
    raw: ConfigFile,
    generation: GenerationDefaults,
    *,
    default_head_dim: int | None = None,
    qkv_bias: bool = False,
    attention_output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sliding_windows: tuple[int | None, ...] | None = None,
) -> ModelConfig:
    """The fields that these families name alike; the keywords are what they differ in."""
    shape = config_module.read_attention_shape(raw, default_head_dim=default_head_dim)
    max_positions = raw.integer("max_position_embeddings", maximum=config_module.MAX_POSITIONS)
    vocab_size = raw.integer("vocab_size", maximum=config_module.MAX_VOCAB)
    return ModelConfig(
        architecture=config_module.read_architecture(raw),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=raw.integer("intermediate_size", maximum=config_module.MAX_WIDTH),
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        norm_eps=raw.number("rms_norm_eps", default=1e-6, minimum=0.0, maximum=1.0),
        activation=raw.choice("hidden_act", frozenset(GATED_ACTIVATIONS), default="silu"),
        tie_word_embeddings=raw.boolean("tie_word_embeddings", default=False),
        sliding_windows=sliding_windows or (None,) * shape.num_layers,
        attention_scales=shape.scales,
        rope=config_module.read_rope(raw, shape.head_dim, max_positions),
        qkv_bias=qkv_bias,
        attention_output_bias=attention_output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        dtype=config_module.read_dtype(raw),
        eos_token_ids=config_module.read_eos_token_ids(raw, generation, vocab_size),
        generation=generation,
    )
