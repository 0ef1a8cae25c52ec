"""What a KV block looks like, and whether two workers' blocks are the same thing."""

from __future__ import annotations

from dataclasses import dataclass, fields

from baton.kvtransfer.versions import WIRE_VERSIONS, VersionRange

BLOCK_ORDER = "layer,kv,token,head,dim"
"""Order of the axes inside a block, slowest first; kv is 0 for K and 1 for V."""

BLOCK_NAME_BYTES = 16
"""Length of a block's name: the chained keyed hash of its tokens and all before them."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one block: ``block_size`` tokens' K and V of all layers, contiguous, axes in ``order``."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    order: str = BLOCK_ORDER

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"KV layout: {name} is {getattr(self, name)}, not at least 1")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        elements = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one block as a tensor, in the axes of BLOCK_ORDER."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last one perhaps partly."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Compatibility:
    """What must agree before two workers may exchange blocks, and ``versions`` of the wire, of which one must be common."""

    model_fingerprint: str
    layout: KVLayout
    versions: VersionRange = WIRE_VERSIONS


def mismatch(ours: Compatibility, theirs: Compatibility) -> str | None:
    """Names every value that differs, ours first, or returns None when blocks of one are blocks of the other."""
    pairs = [
        ("model fingerprint", ours.model_fingerprint, theirs.model_fingerprint),
        *(
            (f"KV {field.name}", getattr(ours.layout, field.name), getattr(theirs.layout, field.name))
            for field in fields(KVLayout)
        ),
    ]
    differing = [f"{name}: {ours!r} here, {theirs!r} there" for name, ours, theirs in pairs if ours != theirs]
    return "; ".join(differing) or None
