"""What blocks a worker has, as it says itself, and which versions of the wire it speaks."""

from __future__ import annotations

from baton.api.common.v1 import common_pb2 as pb
from baton.kvtransfer.versions import VersionRange


def compatibility_key(compatibility: pb.Compatibility) -> str:
    """Workers with equal keys have the same blocks, and exchange them if they also speak a version of the wire together."""
    layout = compatibility.layout
    return "/".join(
        str(part)
        for part in (
            compatibility.model_fingerprint,
            layout.num_layers,
            layout.num_kv_heads,
            layout.head_dim,
            layout.block_size,
            layout.dtype,
            layout.order,
        )
    )


def wire_versions(compatibility: pb.Compatibility) -> VersionRange:
    """Those of the worker; what makes no sense is taken for the oldest version there is, which the handshake will decide on."""
    oldest = max(1, compatibility.protocol_version)
    return VersionRange(oldest, max(oldest, compatibility.newest_protocol_version))


def block_bytes(layout: pb.KVLayout) -> int:
    """Bytes of one block: K and V of all layers."""
    element_bytes = 4 if layout.dtype == "float32" else 2
    return 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * layout.block_size * element_bytes
