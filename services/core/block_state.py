"""What the block pool knows of a block, and what its ledger shows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from baton.services.core.cache_share import CacheShare
from baton.services.core.sessions import Session


class Owner(Enum):
    """The two kinds of owners that a block may have at once."""

    REQUEST = "request"
    TRANSFER = "transfer"


class BlockState(StrEnum):
    """Exclusive states; the blocks of a pool are the sum over them."""

    FREE = "free"  # holds nothing
    CACHED = "cached"  # holds a named block that nobody uses: evictable prefix cache
    REQUEST = "request"  # held by a request
    TRANSFER = "transfer"  # held by a transfer only
    QUARANTINE = "quarantine"  # given up, but a write could still land


@dataclass(slots=True, eq=False)
class Hold:
    """One holder of any number of blocks. ``deadline_s``, on the worker's clock, may move while it holds them."""

    owner: Owner
    holder: str  # request id; for a transfer "request id/attempt"
    deadline_s: float | None = None
    num_blocks: int = 0  # kept by the pool, as is
    since_s: float = 0.0  # when it began to hold blocks, or left them in quarantine
    session: Session | None = None  # the conversation that keeps the blocks afterwards
    tenant: str = ""  # whose share of the cache the blocks count to that it takes
    weight: float = 1.0  # of the tenant

    def __str__(self) -> str:
        return f"{self.owner.value} {self.holder}"


class Block:
    """One block's entry in the pool."""

    __slots__ = ("generation", "name", "request_hold", "request_refs", "share", "transfer_hold", "transfer_refs")

    def __init__(self) -> None:
        self.generation = 0  # grows each time the block is given out
        self.name: bytes | None = None
        self.share: CacheShare | None = None  # whose it is; None: it is free
        self.request_refs = 0
        self.transfer_refs = 0
        self.request_hold: Hold | None = None  # the latest of them; set while request_refs > 0
        self.transfer_hold: Hold | None = None


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks of a pool by state."""

    total: int
    free: int
    cached: int
    request: int
    transfer: int
    quarantine: int

    @property
    def error(self) -> int:
        """Total minus the sum of the states: 0, or a bug."""
        return self.total - self.free - self.cached - self.request - self.transfer - self.quarantine

    def by_state(self, state: BlockState) -> int:
        count: int = getattr(self, state.value)
        return count


@dataclass(frozen=True, slots=True)
class NameEvents:
    """Which names can be found since the last time, and which no longer. A name is in at most one of the two."""

    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of the ledger."""

    block_id: int
    state: BlockState
    generation: int
    name: bytes | None
    request_refs: int
    transfer_refs: int
    request_id: str | None  # the latest request that holds it
    handoff: str | None  # the latest transfer that holds it, or left it in quarantine
    deadline_s: float | None  # the earliest of theirs
    since_s: float | None  # when the later of its holders began to hold blocks, or left them in quarantine

    def is_overdue(self, now: float) -> bool:
        """Held past a deadline of its holders."""
        return self.deadline_s is not None and self.deadline_s < now
