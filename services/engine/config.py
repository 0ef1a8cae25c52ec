"""What the engine knows of a model: its shape in family-neutral words, read from config.json without running anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from baton.services.engine.config_file import ConfigFile

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

# Bounds against nonsense, far above any published model. Real memory is taken only after the weights' headers agreed.
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 11
MAX_HEAD_DIM = 1 << 10
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 27

_ROPE_SCALINGS = frozenset({"default", "linear", "llama3"})


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. ``scaling`` is "default", "linear" (uses ``factor``) or "llama3" (uses all four)."""

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's makers recommend where a request says nothing. None: no recommendation."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of one decoder-only transformer."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    activation: str
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]  # per layer: how many positions back, itself included; None: all
    attention_scales: tuple[float, ...]  # per layer: factor of the dot products
    rope: RopeConfig | None = None  # None: learned positions
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's query and key
    norm_first: bool = True  # normalise before attention and MLP (False: after)
    final_norm: bool = True
    embedding_size: int = 0  # width of the embedding table; 0: hidden_size
    dtype: str | None = None  # what the checkpoint says it is in
    eos_token_ids: frozenset[int] = frozenset()
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads and width, checked against each other."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def scales(self) -> tuple[float, ...]:
        """The usual 1/sqrt(head_dim), for each layer."""
        return (self.head_dim**-0.5,) * self.num_layers


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """``generation_config.json`` of a model folder; all None when there is no such file."""
    path = folder / GENERATION_CONFIG_NAME
    if not path.exists():
        return GenerationDefaults()
    raw = ConfigFile.read(path)
    top_k = raw.optional_integer("top_k", minimum=-1)  # some say "off" as -1, some as 0
    return GenerationDefaults(
        temperature=raw.optional_number("temperature", minimum=0.0, maximum=100.0),
        top_p=raw.optional_number("top_p", minimum=0.0, maximum=1.0),
        top_k=None if top_k is None else max(top_k, 0),
        min_p=raw.optional_number("min_p", minimum=0.0, maximum=1.0),
        repetition_penalty=raw.optional_number("repetition_penalty", minimum=1e-3, maximum=1e3),
        eos_token_ids=raw.token_ids("eos_token_id"),
    )


def read_architecture(raw: ConfigFile) -> str:
    """The one class name in ``architectures``. Refuses code in the folder and quantised weights, by name."""
    if "auto_map" in raw:
        raise raw.fail("auto_map", "no such field: code from a model folder is never run")
    if "quantization_config" in raw:
        raise raw.fail("quantization_config", "no such field: quantised weights are not supported")
    names = raw.strings("architectures")
    if names is None or len(names) != 1:
        raise raw.fail("architectures", "a list with one name")
    return names[0]


def read_attention_shape(
    raw: ConfigFile,
    *,
    layers: str = "num_hidden_layers",
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    kv_heads: str | None = "num_key_value_heads",
    default_head_dim: int | None = None,
) -> AttentionShape:
    """Heads and width from the fields of these names. ``kv_heads`` None: as many as query heads, and no ``head_dim``."""
    num_layers = raw.integer(layers, maximum=MAX_LAYERS)
    hidden_size = raw.integer(hidden, maximum=MAX_WIDTH)
    num_heads = raw.integer(heads, maximum=MAX_HEADS)
    num_kv_heads = num_heads if kv_heads is None else raw.integer(kv_heads, default=num_heads, maximum=MAX_HEADS)
    head_dim = None if kv_heads is None else raw.optional_integer("head_dim", maximum=MAX_HEAD_DIM)
    head_dim = head_dim or default_head_dim
    if head_dim is None:
        if hidden_size % num_heads:
            raise raw.fail(hidden, f"a multiple of {heads} ({num_heads})")
        head_dim = hidden_size // num_heads
        if head_dim > MAX_HEAD_DIM:
            raise raw.fail(heads, f"at least {-(-hidden_size // MAX_HEAD_DIM)} for {hidden} {hidden_size}")
    if kv_heads is not None and num_heads % num_kv_heads:
        raise raw.fail(kv_heads, f"a divisor of {heads} ({num_heads})")
    return AttentionShape(num_layers, hidden_size, num_heads, num_kv_heads, head_dim)


def read_rope(raw: ConfigFile, head_dim: int, max_positions: int) -> RopeConfig:
    """Rotary parameters, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    if head_dim % 2:
        raise raw.fail("head_dim", f"an even number for rotary embedding, not {head_dim}")
    section = raw.section("rope_parameters") or raw.section("rope_scaling") or ConfigFile({}, Path(CONFIG_NAME))
    theta_at = section if "rope_theta" in section else raw
    theta = theta_at.number("rope_theta", default=10000.0, minimum=1.0, maximum=1e12)
    for owner in (section, raw):
        owner.require("partial_rotary_factor", 1.0)
    for layer_type in ("full_attention", "sliding_attention"):
        if layer_type in section:
            raise section.fail(layer_type, "one set of rotary parameters for all layers")
    kind_field = "rope_type" if "rope_type" in section else "type"
    kind = section.choice(kind_field, _ROPE_SCALINGS, default="default")
    if kind == "default":
        return RopeConfig(theta)
    factor = section.number("factor", minimum=1.0, maximum=1e6)
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low = section.number("low_freq_factor", minimum=1e-3, maximum=1e6)
    high = section.number("high_freq_factor", minimum=1e-3, maximum=1e6)
    if high <= low:
        raise section.fail("high_freq_factor", f"more than low_freq_factor ({low:g})")
    owner = raw if "original_max_position_embeddings" in raw else section
    original = owner.integer("original_max_position_embeddings", default=max_positions, maximum=MAX_POSITIONS)
    return RopeConfig(theta, kind, factor, low, high, original)


def read_layer_windows(raw: ConfigFile, num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows as Qwen configures them: a switch, a first layer, or one word for each layer."""
    window = raw.optional_integer("sliding_window") if raw.boolean("use_sliding_window", default=False) else None
    kinds = raw.strings("layer_types")
    if kinds is None:
        first = raw.integer("max_window_layers", default=28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise raw.fail("layer_types", f'{num_layers} of "full_attention" or "sliding_attention"')
    if window is None and "sliding_attention" in kinds:
        raise raw.fail("layer_types", "no sliding_attention while use_sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_eos_token_ids(raw: ConfigFile, generation: GenerationDefaults, vocab_size: int) -> frozenset[int]:
    """Ids that end a generation: generation_config.json has the last word, as in transformers.

    Ids outside the vocabulary are left out: some published configs carry them, and they can never be drawn.
    """
    ids = raw.token_ids("eos_token_id") or ()
    if generation.eos_token_ids is not None:
        ids = generation.eos_token_ids
    return frozenset(token_id for token_id in ids if 0 <= token_id < vocab_size)


def read_dtype(raw: ConfigFile) -> str | None:
    """What the checkpoint says it is in: ``dtype`` (transformers 5) or ``torch_dtype``."""
    for name in ("dtype", "torch_dtype"):
        if name in raw:
            return raw.string(name).removeprefix("torch.")
    return None
