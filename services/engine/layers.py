"""The building blocks that model families are wired from, on top of ``baton.kernels``.

Plain classes, not torch modules: nothing here is trained, and a decode step of a small model is dominated by call overhead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from baton import kernels
from baton.services.engine.batch import ForwardBatch
from baton.services.engine.config import ModelConfig, RopeConfig
from baton.services.engine.kv_cache import KVCache
from baton.services.engine.models.base import WeightSource

_MIN_ROTARY_POSITIONS = 4096

Activation = Callable[[torch.Tensor], torch.Tensor]


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> kernels.Linear:
    """A linear map with ``weight`` [out_features, in_features] in the layout that the device multiplies fastest."""
    if weight.is_meta:  # only asked for its names and shapes
        return lambda x: F.linear(x, weight, bias)
    return kernels.pack_linear(weight, bias)


def load_linear(source: WeightSource, name: str, out_features: int, in_features: int, *, bias: bool) -> kernels.Linear:
    """``name.weight`` [out_features, in_features] and, with ``bias``, ``name.bias``."""
    return load_fused_linear(source, ((name, out_features),), in_features, bias=bias)


def load_fused_linear(
    source: WeightSource, parts: Sequence[tuple[str, int]], in_features: int, *, bias: bool
) -> kernels.Linear:
    """Linear maps of one input as one multiplication: ``parts`` are (name, out_features), outputs side by side."""
    weights = [source.tensor(f"{name}.weight", out_features, in_features) for name, out_features in parts]
    biases = [source.tensor(f"{name}.bias", out_features) for name, out_features in parts] if bias else []
    if len(parts) == 1:
        return pack(weights[0], biases[0] if bias else None)
    return pack(_joined(weights), _joined(biases) if bias else None)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``parts`` one behind the other along their first dimension."""
    first = parts[0]
    if first.is_meta:  # torch joins these by way of its compiler, whose import takes longer than a small model's load
        return first.new_empty((sum(len(part) for part in parts), *first.shape[1:]))
    return torch.cat(list(parts))


def load_conv1d(source: WeightSource, name: str, out_features: int, in_features: int) -> kernels.Linear:
    """GPT-2's linear map: its checkpoints hold the weight transposed, [in_features, out_features]."""
    weight = source.tensor(f"{name}.weight", in_features, out_features)
    return pack(weight.t().contiguous(), source.tensor(f"{name}.bias", out_features))


class LayerNorm:
    """Layer normalisation with weight and bias."""

    __slots__ = ("bias", "eps", "weight")

    def __init__(self, source: WeightSource, name: str, size: int, eps: float) -> None:
        self.weight = source.tensor(f"{name}.weight", size)
        self.bias = source.tensor(f"{name}.bias", size)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class PagedAttention:
    """Attention of one layer: stores this step's K and V, then reads each sequence's whole context from its blocks.

    In the last layer it returns the batch's output rows only; what is added to them must be selected alike.
    """

    __slots__ = ("is_last", "layer", "scale", "window")

    def __init__(self, config: ModelConfig, layer: int) -> None:
        self.layer = layer
        self.is_last = layer == config.num_layers - 1
        self.scale = config.attention_scales[layer]
        self.window = config.sliding_windows[layer]

    def __call__(
        self,
        q: torch.Tensor,  # [T, num_heads, head_dim]
        k: torch.Tensor,  # [T, num_kv_heads, head_dim]
        v: torch.Tensor,  # [T, num_kv_heads, head_dim]
        batch: ForwardBatch,
        cache: KVCache,
    ) -> torch.Tensor:  # [T, num_heads * head_dim]; [R, ...] in the last layer
        cache.progress.enter_layer(self.layer)
        k_cache, v_cache = cache.layers[self.layer]
        kernels.store_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        rows = batch.rows
        if self.is_last:
            q, rows = batch.select_outputs(q), batch.last_layer_rows
        split, tables, lens = rows.num_decodes, rows.block_tables, rows.seq_lens
        outs = []
        if split:
            plan = rows.decode_plan(self.window)
            outs.append(
                kernels.decode_attention(
                    q[:split], k_cache, v_cache, tables[:split], lens[:split], self.scale, self.window, plan
                )
            )
        if split < rows.num_rows:
            outs.append(
                kernels.prefill_attention(
                    q[split:], k_cache, v_cache, tables[split:], rows.cu_seqlens, lens[split:], self.scale, self.window
                )
            )
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.view(rows.num_rows, -1)


def rope_inv_freq(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Rotation frequencies [head_dim / 2], float32. Su et al., https://arxiv.org/abs/2104.09864; "linear" is position
    interpolation, https://arxiv.org/abs/2306.15595; "llama3" leaves short wavelengths alone, divides long ones by the
    factor and blends in between, as Llama 3.1's reference code does.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq: torch.Tensor = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "llama3":
        wavelength = 2 * math.pi / inv_freq
        turns = rope.original_max_position_embeddings / wavelength
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return (1 - kept) * inv_freq / rope.factor + kept * inv_freq
    return inv_freq


class RotaryTable:
    """Cosines and sines by position, as many as were needed so far.

    It doubles instead of covering the longest context at once: for 128k positions that would be 64 MB per worker, and
    the number comes from a file.
    """

    __slots__ = ("_cos_sin", "_device", "_inv_freq")

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        if config.rope is None:
            raise ValueError("rotary layers need rotary parameters")
        self._device = device
        self._inv_freq = rope_inv_freq(config.rope, config.head_dim)
        # Computing no rows would do as well, but see ``_joined``.
        self._cos_sin = torch.empty(0, 2 * len(self._inv_freq), dtype=torch.float32, device=device)

    def up_to(self, num_positions: int) -> torch.Tensor:
        """[at least num_positions, head_dim] float32: cosines, then sines."""
        if self._cos_sin.shape[0] < num_positions:
            self._cos_sin = self._build(max(num_positions, 2 * self._cos_sin.shape[0], _MIN_ROTARY_POSITIONS))
        return self._cos_sin

    def _build(self, num_positions: int) -> torch.Tensor:
        return kernels.build_rope_cache(self._inv_freq.to(self._device), num_positions, 1.0, torch.float32)


def load_head(source: WeightSource, config: ModelConfig, embedding: torch.Tensor, name: str) -> kernels.Linear:
    """The output projection: the embedding table itself when tied, else ``name.weight``."""
    width = embedding.shape[1]
    weight = embedding if config.tie_word_embeddings else source.tensor(f"{name}.weight", config.vocab_size, width)
    return pack(weight, None)


ACTIVATIONS: dict[str, Activation] = {
    "relu": torch.relu,
    "gelu": lambda x: kernels.gelu(x, "none"),
    "gelu_new": lambda x: kernels.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x: kernels.gelu(x, "tanh"),
}

# Of one projection that holds gate and up side by side.
GATED_ACTIVATIONS: dict[str, Activation] = {
    "silu": kernels.silu_and_mul,
    "gelu": lambda x: kernels.gelu_and_mul(x, "none"),
    "gelu_pytorch_tanh": lambda x: kernels.gelu_and_mul(x, "tanh"),
}
