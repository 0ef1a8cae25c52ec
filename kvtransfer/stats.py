"""What a transfer agent counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class TransferStats:
    """Totals since start, and what there is now. Bytes are of blocks, by transport."""

    bytes_sent: Counter[str] = field(default_factory=Counter)
    bytes_received: Counter[str] = field(default_factory=Counter)  # landed and verified
    handoffs_sent: int = 0  # acknowledged
    handoffs_received: int = 0  # adopted
    failures: Counter[str] = field(default_factory=Counter)  # handoffs that failed on either side, by code
    fallbacks: Counter[str] = field(
        default_factory=Counter
    )  # handoffs under way went on by another than this transport
    fenced: int = 0  # messages and frames refused as stale, late, unknown or not granted
    corrupt_blocks: int = 0  # arrived with a wrong checksum, canaries' too
    num_sending: int = 0  # handoffs open now
    num_receiving: int = 0
    num_quarantined: int = 0  # slots given up that a write can still land in, now
