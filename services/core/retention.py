"""Which cached blocks conversations keep between their turns: a bias in the order of reuse, inside a budget, never a lock.

A session is a tag on blocks, which are what their contents are: several sessions may keep one block, and any request may
use it. Blocks that a session keeps are cached blocks like others, and available like others. Only their turn to be reused
comes later, among those of their tenant:

    1. blocks that only a closed session kept, tail first
    2. blocks that no session keeps, least recently used first; those of a session whose time is over among them,
       in the place that they would have without it
    3. blocks that a session keeps: the session whose time is over soonest first, its chain from the tail

At most ``max_blocks`` blocks are kept. What is more takes the place of what would be reused before it, in the same order,
or is not kept. Tenants share that budget by weight, like the blocks themselves: whoever keeps most for its weight makes
room for one that keeps less. Time passes when somebody asks: ``now`` is passed in, and nothing happens in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from baton.services.core.cache_share import CacheShare, CacheShares
from baton.services.core.sessions import Session, SessionTag, Soonest

# Positions of blocks of closed sessions lie before all positions of others, which count from 0.
_FIRST_CLOSED = -(1 << 62)
_SLACK = 64  # entries of a heap that may be out of date, beside as many as are not


class Retention:
    """The sessions of one pool. Belongs to the pool's thread; every operation is O(log sessions) a block."""

    def __init__(
        self, max_blocks: int, max_sessions: int, shares: CacheShares, share_of: Callable[[int], CacheShare | None]
    ) -> None:
        """``share_of`` a block: whose it is. None: it is free."""
        self.max_blocks = max_blocks
        self._max_sessions = max_sessions
        self._shares = shares
        self._share_of = share_of
        self._sessions: dict[str, Session] = {}
        self._owners: dict[int, set[Session]] = {}
        self._by_expiry = Soonest()
        self._next_position = 0
        self._next_closed = _FIRST_CLOSED

    @property
    def num_kept(self) -> int:
        """Blocks that sessions keep, in use or not."""
        return len(self._owners)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def get(self, key: str, now: float) -> Session | None:
        """A session whose time is not over."""
        self.lapse(now)
        return self._sessions.get(key)

    # Sessions.

    def open(self, tag: SessionTag, now: float, tenant: str = "", weight: float = 1.0) -> Session:
        """A request of the conversation begins: its time begins anew."""
        self.lapse(now)
        share = self._shares.of(tenant, weight)
        session = self._sessions.get(tag.key)
        if session is not None and session.share is not share:  # names tell tenants apart: somebody called it another's
            self._drop(session)
            session = None
        if session is None:
            session = self._add(Session(tag.key, tag.ttl_s, share))
        session.ttl_s = tag.ttl_s
        self._touch(session, now)
        return session

    def keep(self, session: Session, block_ids: Sequence[int], now: float) -> None:
        """A request of the conversation has let go of these named blocks, a chain: they are kept as far as there is room."""
        if session.is_closed:
            self._dismiss(reversed(block_ids))
            return
        self.lapse(now)
        known = self._sessions.get(session.key)
        if known is None:
            session.share = self._shares.of(session.share.tenant, session.share.weight)
            known = self._add(session)
        session, share = known, known.share
        self._touch(session, now)
        session.blocks = _first(block_ids, session.blocks, session.blocks)
        chain, added = frozenset(block_ids), set[int]()
        for block_id in block_ids:
            if block_id in session.blocks or self._share_of(block_id) is not share:
                continue
            owners = self._owners.get(block_id)
            if owners is None:
                if len(self._owners) >= self.max_blocks and not self._make_room(session, chain):
                    break
                owners = self._owners[block_id] = set()
                share.num_kept += 1
            owners.add(session)
            added.add(block_id)
        session.blocks = _first(block_ids, session.blocks.keys() | added, session.blocks)
        share.with_blocks.push(session)
        self._shares.by_kept.raised(share)

    def close(self, key: str, now: float) -> bool:
        """The conversation is over. What only it kept is reused before all else of its tenant. False: it was not known."""
        session = self.get(key, now)
        if session is None:
            return False
        session.is_closed = True
        blocks = list(reversed(session.blocks))
        self._drop(session)
        self._dismiss(blocks)
        return True

    def lapse(self, now: float) -> None:
        """Sessions whose time is over keep nothing any more."""
        while (session := self._by_expiry.first()) is not None and session.expires_s <= now:
            self._drop(session)

    # For the pool.

    def take(self, share: CacheShare) -> int:
        """The idle named block of this tenant that is reused next. There must be one."""
        if not share.num_kept and not share.aside:
            return share.cached.popitem(last=False)[0]
        while True:
            while share.loose:
                position, block_id = heappop(share.loose)
                if share.aside.get(block_id) == position:
                    del share.aside[block_id]
                    return block_id
            while share.cached:
                block_id, _none = share.cached.popitem(last=False)
                if block_id not in self._owners:
                    return block_id
                share.aside[block_id] = self._next_position
                self._next_position += 1
            session = _first_with_blocks(share)
            assert session is not None
            self._disown(session.blocks.popitem()[0], session)

    def forget(self, block_id: int) -> None:
        """The block has lost its name: nobody keeps it."""
        owners = self._owners.pop(block_id, None)
        if owners is None:
            return
        for session in owners:
            del session.blocks[block_id]
            share = session.share
        share.num_kept -= 1

    def contradictions(self, named: Iterable[int], idle: Iterable[int]) -> Iterator[str]:
        """What a recount finds that is not as it should be. ``idle``: of the ``named`` blocks, those that nobody holds."""
        if len(self._owners) > self.max_blocks:
            yield f"sessions keep {len(self._owners)} blocks of at most {self.max_blocks}"
        if unnamed := sorted(self._owners.keys() - set(named)):
            yield f"sessions keep blocks without names, {unnamed[:10]}"
        pairs = {(session, block_id) for block_id, owners in self._owners.items() for session in owners}
        if pairs != {(session, block_id) for session in self._sessions.values() for block_id in session.blocks}:
            yield "sessions and blocks contradict each other on who keeps what"
        if len(self._sessions) != sum(len(share.sessions) for share in self._shares):
            yield f"{len(self._sessions)} sessions are known, and others by tenant"
        idle = set(idle)
        for share in self._shares:
            kept = {block_id for session in share.sessions.values() for block_id in session.blocks}
            if len(kept) != share.num_kept or any(self._share_of(block_id) is not share for block_id in kept):
                yield f"sessions of tenant {share.tenant!r} keep {len(kept)} blocks, {share.num_kept} are counted"
            if held := sorted(share.aside.keys() - idle):
                yield f"blocks {held[:10]} are put aside, but in use"
            loose = {block_id for position, block_id in share.loose if share.aside.get(block_id) == position}
            if lost := sorted(share.aside.keys() - self._owners.keys() - loose):
                yield f"blocks {lost[:10]} are put aside, but nobody keeps them"

    # Inside.

    def _add(self, session: Session) -> Session:
        share = session.share
        self._sessions[session.key] = share.sessions[session.key] = session
        self._shares.by_sessions.raised(share)
        if len(self._sessions) > self._max_sessions and (most := self._shares.by_sessions.first()) is not None:
            # Of whoever has most for its weight. The new one is in no order yet, so that it is not the one.
            soonest = most.by_expiry.first() or self._by_expiry.first()
            if soonest is not None:
                self._drop(soonest)
        session.is_known = True
        return session

    def _touch(self, session: Session, now: float) -> None:
        session.expires_s = now + session.ttl_s
        self._by_expiry.push(session)
        self._by_expiry.compact(self._sessions)
        share = session.share
        for soonest in (share.by_expiry, share.with_blocks):
            soonest.push(session)
            soonest.compact(share.sessions)

    def _drop(self, session: Session) -> None:
        """It is not known any more, and what it kept is where it would be without it."""
        del self._sessions[session.key], session.share.sessions[session.key]
        session.is_known = False
        blocks, session.blocks = session.blocks, {}
        for block_id in blocks:
            self._disown(block_id, session)
        self._shares.tidy(session.share)

    def _disown(self, block_id: int, session: Session) -> bool:
        """One session keeps the block no longer. True: nobody does."""
        owners = self._owners[block_id]
        owners.discard(session)
        if owners:
            return False
        del self._owners[block_id]
        share = session.share
        share.num_kept -= 1
        if (position := share.aside.get(block_id)) is not None:
            heappush(share.loose, (position, block_id))
        return True

    def _dismiss(self, block_ids: Iterable[int]) -> None:
        """Those of them that nobody keeps or holds are reused first, in this order."""
        for block_id in block_ids:
            share = self._share_of(block_id)
            if share is None or block_id in self._owners:
                continue
            if block_id in share.cached:
                del share.cached[block_id]
            elif block_id not in share.aside:
                continue
            share.aside[block_id] = self._next_closed
            heappush(share.loose, (self._next_closed, block_id))
            self._next_closed += 1
            if len(share.loose) > 2 * len(share.aside) + _SLACK:
                share.loose = [entry for entry in share.loose if share.aside.get(entry[1]) == entry[0]]
                heapify(share.loose)

    def _make_room(self, session: Session, chain: frozenset[int]) -> bool:
        """Takes one block from whoever would lose it first. False: that is the one for which there should be room."""
        share, most = session.share, self._shares.by_kept.first()
        if most is not None and most.num_kept / most.weight > (share.num_kept + 1) / share.weight:
            share = most
        while (first := _first_with_blocks(share)) is not None:
            block_id = next(reversed(first.blocks))
            if share is session.share:
                if first is session and block_id in chain:
                    return False
                if first is not session and first.expires_s > session.expires_s:
                    return False
            del first.blocks[block_id]
            if self._disown(block_id, first):
                return True
        return False


def _first_with_blocks(share: CacheShare) -> Session | None:
    """The session of this tenant that loses a block next."""
    while (session := share.with_blocks.first()) is not None and not session.blocks:
        share.with_blocks.pop()
    return session


def _first(block_ids: Iterable[int], among: Iterable[int], others: dict[int, None]) -> dict[int, None]:
    """``block_ids`` as far as they are ``among``, then ``others``."""
    known = among if isinstance(among, dict) else frozenset(among)
    ordered: dict[int, None] = {block_id: None for block_id in block_ids if block_id in known}
    ordered.update(others)
    return ordered
