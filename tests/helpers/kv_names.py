"""Workers, handoffs and blocks for the transfer tests."""

from __future__ import annotations

from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.messages import FirstToken, Slot

SENDER = WorkerIdentity("prefill-0", "a" * 32)
RECEIVER = WorkerIdentity("decode-0", "b" * 32)
HANDOFF = HandoffId(HandoffKey("req-1", 1), SENDER, RECEIVER)
TOKEN = bytes(range(32))
FIRST_TOKEN = FirstToken(42)
BLOCK_BYTES = 64


def names(num_blocks: int) -> tuple[bytes, ...]:
    """Distinct block names."""
    return tuple(index.to_bytes(16, "little") for index in range(1, num_blocks + 1))


def slots(*indices: int) -> tuple[Slot, ...]:
    """A slot for each index: block 100 + index, generation 7."""
    return tuple(Slot(index, 100 + index, 7) for index in indices)


def checksum(index: int) -> int:
    """What stands for the checksum of block ``index``."""
    return 1_000_003 * (index + 1)
