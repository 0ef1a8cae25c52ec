"""Cached blocks that move between workers for no request here: what a peer reads is pinned, what it writes is granted.

A worker that lacks blocks which another holds fetches them instead of computing them. Towards the pool that is one holder
of blocks on each side, a transfer, and no request: it takes no part in the queue, is never waited for, and ends in cached
blocks that anybody may reuse or evict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import Hold, Owner
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.scheduler.base import Slot
from baton.services.core.slo import ServiceLevel


class MovesCache(Protocol):
    """A scheduler whose cached blocks can move."""

    @property
    def moves(self) -> CacheMoves: ...

    def room_for_moves(self) -> int:
        """Blocks that may be taken to bring cached ones here."""
        ...


@dataclass(slots=True, eq=False)
class _Taken:
    """One move to this worker."""

    hold: Hold
    names: tuple[bytes, ...]
    here: dict[int, int]  # index -> block that was here already; pinned, or it could go while the rest comes
    to_fill: dict[int, int]  # index -> block that the peer fills
    is_quarantined: bool = False


class CacheMoves:
    """All moves of one pool, by a label that the caller makes unique: given ones and taken ones apart."""

    def __init__(self, pool: BlockPool, lease_s: float) -> None:
        self._pool = pool
        self._lease_s = lease_s
        self._given: dict[str, tuple[Hold, list[int]]] = {}
        self._taken: dict[str, _Taken] = {}

    # Giving.

    def pin(self, label: str, names: Sequence[bytes], now: float) -> list[int]:
        """The longest leading run of ``names`` that is here, kept from eviction until ``unpin``. Empty: nothing is pinned.

        Raises BatonError where ``label`` is being given already.
        """
        if label in self._given:
            raise BatonError(ErrorCode.INVALID_REQUEST, f"blocks are already being given for {label}")
        block_ids = self._pool.lookup(names)
        if block_ids:
            hold = Hold(Owner.TRANSFER, label, now + self._lease_s)
            self._pool.acquire(block_ids, hold)
            self._given[label] = (hold, block_ids)
        return block_ids

    def unpin(self, label: str) -> None:
        """Nothing reads the blocks any more. Idempotent."""
        if (given := self._given.pop(label, None)) is not None:
            hold, block_ids = given
            self._pool.release(block_ids, hold)

    # Taking.

    def reserve(
        self, label: str, names: Sequence[bytes], room: int, now: float, level: ServiceLevel | None = None
    ) -> tuple[Slot, ...]:
        """Blocks to fill for those of ``names`` that are not here. It takes at most ``room`` available blocks.

        ``level``: of the request that they come for, whose tenant's they are.

        Raises BatonError where that is not enough: what is fetched only saves time, so it never waits.
        """
        if label in self._taken:
            raise BatonError(ErrorCode.INVALID_REQUEST, f"blocks are already being taken for {label}")
        here = {index: found[0] for index, name in enumerate(names) if (found := self._pool.lookup((name,)))}
        missing = [index for index in range(len(names)) if index not in here]
        num_taken = len(missing) + sum(map(self._pool.is_idle, here.values()))
        if num_taken > min(room, self._pool.num_available):
            raise BatonError(
                ErrorCode.OVERLOADED, f"{num_taken} blocks wanted for {label}, room for {max(0, room)}", retryable=True
            )
        level = level or ServiceLevel()
        hold = Hold(Owner.TRANSFER, label, now + self._lease_s, tenant=level.tenant, weight=level.weight)
        self._pool.acquire(list(here.values()), hold)
        to_fill = dict(zip(missing, self._pool.allocate(len(missing), hold), strict=True))
        self._taken[label] = _Taken(hold, tuple(names), here, to_fill)
        return tuple(Slot(index, block_id, self._pool.generation(block_id)) for index, block_id in to_fill.items())

    def commit(self, label: str) -> None:
        """Everything has arrived and was verified: from now on it is prefix cache. Raises BatonError for an unknown move."""
        taken = self._taken.get(label)
        if taken is None or taken.is_quarantined:
            raise BatonError(ErrorCode.HANDOFF_FAILED, f"no blocks are taken for {label} (any more)")
        for index, block_id in taken.to_fill.items():
            self._pool.name_block(block_id, taken.names[index])
        blocks = {**taken.here, **taken.to_fill}
        # In the order of the chain, so that it is evicted from its tail.
        self._pool.release([blocks[index] for index in sorted(blocks)], taken.hold)
        del self._taken[label]

    def let_go(self, label: str, *, writes_quiet: bool, now: float) -> None:
        """The move has ended without a commit. While a write can land, the blocks stay in quarantine. Idempotent."""
        taken = self._taken.get(label)
        if taken is None:
            return
        if not taken.is_quarantined:
            self._pool.release([taken.here[index] for index in sorted(taken.here)], taken.hold)
        block_ids = list(taken.to_fill.values())
        if not writes_quiet:
            if not taken.is_quarantined:
                self._pool.quarantine(block_ids, taken.hold)
                taken.is_quarantined = True
                taken.hold.deadline_s = now + self._lease_s
            return
        if taken.is_quarantined:
            self._pool.release_quarantine(block_ids)
        else:
            self._pool.release(block_ids, taken.hold)
        del self._taken[label]

    def renew(self, labels: Iterable[str], now: float) -> None:
        """These moves are alive: their blocks are overdue only after another lease. Quarantine is not prolonged."""
        for label in labels:
            if (given := self._given.get(label)) is not None:
                given[0].deadline_s = now + self._lease_s
            if (taken := self._taken.get(label)) is not None and not taken.is_quarantined:
                taken.hold.deadline_s = now + self._lease_s
