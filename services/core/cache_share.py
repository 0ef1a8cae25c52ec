"""What each tenant has of one pool's blocks, and who of them gives the next one when room is needed.

A tenant's fair share is that part of the blocks which its weight is of all weights. Nobody is held to it: as long as nobody
else wants them, one tenant may have all blocks. Where room is made, it is made by whoever has most for its weight among
those that have idle blocks; in what order it gives its own does not depend on others. So whoever has no more than its
share loses nothing to one that has more, as long as that one has an idle block left.

What a tenant has is its blocks in use and its cached ones: who computes much at a time keeps less for later.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from baton.services.core.sessions import Session, Soonest

_SLACK = 64  # entries of a heap that may be out of date, beside as many as are not


@dataclass(slots=True, eq=False)
class CacheShare:
    """One tenant in one pool."""

    tenant: str
    weight: float
    num_blocks: int = 0  # cached, in use or in quarantine
    num_kept: int = 0  # of those, what its sessions keep
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Idle named blocks, least recently used first, but for those that are ``aside``."""
    aside: dict[int, int] = field(default_factory=dict)
    """Idle named blocks that are not in ``cached``, with their positions: older than all in there, or first to go."""
    loose: list[tuple[int, int]] = field(default_factory=list)  # a heap of (position, block) aside that nobody keeps
    sessions: dict[str, Session] = field(default_factory=dict)
    by_expiry: Soonest = field(default_factory=Soonest)
    with_blocks: Soonest = field(default_factory=Soonest)


class MostOver:
    """Shares by a level that changes all the time, the highest first. O(log shares)."""

    def __init__(self, level: Callable[[CacheShare], float | None]) -> None:
        """``level``: a share's at present; None: it is not asked for."""
        self._level = level
        self._heap: list[tuple[float, int, CacheShare]] = []  # of negative levels
        self._listed: dict[CacheShare, float] = {}  # each share's entry that counts. It is never below its level
        self._num_pushed = 0
        self._compact_at = _SLACK

    def __len__(self) -> int:
        return len(self._heap)

    def raised(self, share: CacheShare) -> None:
        """Its level is higher than it was, or it has one again. Where it fell nothing has to be said."""
        level = self._level(share)
        if level is None or self._listed.get(share, 1.0) <= -level:
            return
        self._push(share, -level)
        if len(self._heap) > self._compact_at:
            self._compact()

    def first(self) -> CacheShare | None:
        """Of several with the highest level the one that has had it for longest, roughly."""
        while self._heap:
            listed, number, share = self._heap[0]
            level = self._level(share)
            if self._listed.get(share) != listed:
                heappop(self._heap)
            elif level is None:
                heappop(self._heap)
                del self._listed[share]
            elif -level == listed:
                return share
            else:
                self._listed[share] = -level
                heapreplace(self._heap, (-level, number, share))
        return None

    def _push(self, share: CacheShare, listed: float) -> None:
        self._listed[share] = listed
        heappush(self._heap, (listed, self._num_pushed, share))
        self._num_pushed += 1

    def _compact(self) -> None:
        alive = {share: -level for share in self._listed if (level := self._level(share)) is not None}
        self._listed = alive
        self._heap = [(listed, number, share) for number, (share, listed) in enumerate(alive.items())]
        heapify(self._heap)
        self._num_pushed = len(self._heap)
        self._compact_at = 2 * len(self._heap) + _SLACK


class CacheShares:
    """Everybody who has something in one pool: blocks, or a session that is known."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, CacheShare] = {}
        self.by_blocks = MostOver(_blocks_level)
        self.by_kept = MostOver(_kept_level)
        self.by_sessions = MostOver(_sessions_level)

    def __len__(self) -> int:
        return len(self._by_tenant)

    def __iter__(self) -> Iterator[CacheShare]:
        return iter(self._by_tenant.values())

    def of(self, tenant: str, weight: float) -> CacheShare:
        """The tenant's, whose weight is this from now on. One that has nothing yet is to get something, or ``tidy``."""
        share = self._by_tenant.get(tenant)
        if share is None:
            share = self._by_tenant[tenant] = CacheShare(tenant, weight)
        elif share.weight != weight:
            share.weight = weight
            for order in (self.by_blocks, self.by_kept, self.by_sessions):
                order.raised(share)
        return share

    def next_to_give(self) -> CacheShare:
        """Who gives an idle block where one is needed. There must be one."""
        if len(self._by_tenant) == 1:
            return next(iter(self._by_tenant.values()))
        share = self.by_blocks.first()
        assert share is not None
        return share

    def tidy(self, share: CacheShare) -> None:
        """Forgets a tenant that has nothing any more."""
        if not share.num_blocks and not share.sessions and self._by_tenant.get(share.tenant) is share:
            del self._by_tenant[share.tenant]

    def contradictions(self, share_of: Sequence[CacheShare | None]) -> Iterator[str]:
        """What a recount finds that is not as it is counted. ``share_of`` each block; None: it is free."""
        has = Counter(share_of)
        del has[None]
        for share in {*has, *self}:
            if has[share] != share.num_blocks or self._by_tenant.get(share.tenant) is not share:
                yield f"tenant {share.tenant!r} has {has[share]} blocks, {share.num_blocks} are counted"
            idle = (*share.cached, *share.aside)
            if wrong := sorted(block_id for block_id in idle if share_of[block_id] is not share):
                yield f"blocks {wrong[:10]} are listed for tenant {share.tenant!r}, whose they are not"


def _blocks_level(share: CacheShare) -> float | None:
    return share.num_blocks / share.weight if share.cached or share.aside else None


def _kept_level(share: CacheShare) -> float | None:
    return share.num_kept / share.weight if share.num_kept else None


def _sessions_level(share: CacheShare) -> float | None:
    return len(share.sessions) / share.weight if share.sessions else None
