"""Which cached blocks conversations keep between their turns: a bias in the order of reuse, inside a budget, never a lock.

A session is a tag on blocks, which are what their contents are: several sessions may keep one block, and any request may
use it. Blocks that a session keeps are cached blocks like others, and available like others. Only their turn to be reused
comes later:

    1. blocks that only a closed session kept, tail first
    2. blocks that no session keeps, least recently used first; those of a session whose time is over among them,
       in the place that they would have without it
    3. blocks that a session keeps: the session whose time is over soonest first, its chain from the tail

At most ``max_blocks`` blocks are kept. What is more takes the place of what would be reused before it, in the same order,
or is not kept. Time passes when somebody asks: ``now`` is passed in, and nothing happens in between.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

# Positions of blocks of closed sessions lie before all positions of others, which count from 0.
_FIRST_CLOSED = -(1 << 62)
_SLACK = 64  # entries of a heap that may be out of date, beside as many as are not


@dataclass(frozen=True, slots=True)
class SessionTag:
    """What a request says of its conversation. ``key`` is unique over tenants."""

    key: str
    ttl_s: float  # how long its blocks are kept after its last request


@dataclass(slots=True, eq=False)
class Session:
    """One conversation on one worker."""

    key: str
    ttl_s: float
    expires_s: float = 0.0
    blocks: dict[int, None] = field(
        default_factory=dict
    )  # that it keeps: its latest chain, then what is left of others
    is_known: bool = False
    is_closed: bool = False


class Retention:
    """The sessions of one pool. Belongs to the pool's thread; every operation is O(log sessions) a block."""

    def __init__(self, max_blocks: int, max_sessions: int, cached: OrderedDict[int, None]) -> None:
        """``cached``: the pool's idle named blocks, least recently used first, but for those that are ``aside``."""
        self.max_blocks = max_blocks
        self._max_sessions = max_sessions
        self._cached = cached
        self.aside: dict[int, int] = {}
        """Idle named blocks that are not in ``cached``, with their positions: older than all in there, or first to go."""
        self._sessions: dict[str, Session] = {}
        self._owners: dict[int, set[Session]] = {}
        self._loose: list[tuple[int, int]] = []  # a heap of (position, block) of those aside that nobody keeps
        self._by_expiry = _Soonest()
        self._with_blocks = _Soonest()
        self._next_position = 0
        self._next_closed = _FIRST_CLOSED

    @property
    def is_active(self) -> bool:
        """The order of reuse may be another than the pool's own."""
        return bool(self._owners or self.aside)

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

    def open(self, tag: SessionTag, now: float) -> Session:
        """A request of the conversation begins: its time begins anew."""
        self.lapse(now)
        session = self._sessions.get(tag.key)
        if session is None:
            session = self._add(Session(tag.key, tag.ttl_s))
        session.ttl_s = tag.ttl_s
        self._touch(session, now)
        return session

    def keep(self, session: Session, block_ids: Sequence[int], now: float) -> None:
        """A request of the conversation has let go of these named blocks, a chain: they are kept as far as there is room."""
        if session.is_closed:
            self._dismiss(reversed(block_ids))
            return
        self.lapse(now)
        session = self._sessions.get(session.key) or self._add(session)
        self._touch(session, now)
        session.blocks = _first(block_ids, session.blocks, session.blocks)
        chain, added = frozenset(block_ids), set[int]()
        for block_id in block_ids:
            if block_id in session.blocks:
                continue
            has_room = block_id in self._owners or len(self._owners) < self.max_blocks
            if not has_room and not self._make_room(session, chain):
                break
            self._owners.setdefault(block_id, set()).add(session)
            added.add(block_id)
        session.blocks = _first(block_ids, session.blocks.keys() | added, session.blocks)
        self._with_blocks.push(session)

    def close(self, key: str, now: float) -> bool:
        """The conversation is over. What only it kept is reused before everything else. False: it was not known."""
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

    def take(self) -> int:
        """The idle named block that is reused next. There must be one."""
        while True:
            while self._loose:
                position, block_id = heappop(self._loose)
                if self.aside.get(block_id) == position:
                    del self.aside[block_id]
                    return block_id
            while self._cached:
                block_id, _none = self._cached.popitem(last=False)
                if block_id not in self._owners:
                    return block_id
                self.aside[block_id] = self._next_position
                self._next_position += 1
            session = self._first_with_blocks()
            assert session is not None
            self._disown(session.blocks.popitem()[0], session)

    def forget(self, block_id: int) -> None:
        """The block has lost its name: nobody keeps it."""
        for session in self._owners.pop(block_id, ()):
            del session.blocks[block_id]

    def contradictions(self, named: Iterable[int], idle: Iterable[int]) -> Iterator[str]:
        """What a recount finds that is not as it should be. ``idle``: of the ``named`` blocks, those that nobody holds."""
        if len(self._owners) > self.max_blocks:
            yield f"sessions keep {len(self._owners)} blocks of at most {self.max_blocks}"
        if unnamed := sorted(self._owners.keys() - set(named)):
            yield f"sessions keep blocks without names, {unnamed[:10]}"
        pairs = {(session, block_id) for block_id, owners in self._owners.items() for session in owners}
        if pairs != {(session, block_id) for session in self._sessions.values() for block_id in session.blocks}:
            yield "sessions and blocks contradict each other on who keeps what"
        if held := sorted(self.aside.keys() - set(idle)):
            yield f"blocks {held[:10]} are put aside, but in use"
        loose = {block_id for position, block_id in self._loose if self.aside.get(block_id) == position}
        if lost := sorted(self.aside.keys() - self._owners.keys() - loose):
            yield f"blocks {lost[:10]} are put aside, but nobody keeps them"

    # Inside.

    def _add(self, session: Session) -> Session:
        if len(self._sessions) >= self._max_sessions and (soonest := self._by_expiry.first()) is not None:
            self._drop(soonest)
        self._sessions[session.key] = session
        session.is_known = True
        return session

    def _touch(self, session: Session, now: float) -> None:
        session.expires_s = now + session.ttl_s
        for soonest in (self._by_expiry, self._with_blocks):
            soonest.push(session)
            soonest.compact(self._sessions)

    def _drop(self, session: Session) -> None:
        """It is not known any more, and what it kept is where it would be without it."""
        del self._sessions[session.key]
        session.is_known = False
        blocks, session.blocks = session.blocks, {}
        for block_id in blocks:
            self._disown(block_id, session)

    def _disown(self, block_id: int, session: Session) -> bool:
        """One session keeps the block no longer. True: nobody does."""
        owners = self._owners[block_id]
        owners.discard(session)
        if owners:
            return False
        del self._owners[block_id]
        if (position := self.aside.get(block_id)) is not None:
            heappush(self._loose, (position, block_id))
        return True

    def _dismiss(self, block_ids: Iterable[int]) -> None:
        """Those of them that nobody keeps or holds are reused first, in this order."""
        for block_id in block_ids:
            if block_id in self._owners:
                continue
            if block_id in self._cached:
                del self._cached[block_id]
            elif block_id not in self.aside:
                continue
            self.aside[block_id] = self._next_closed
            heappush(self._loose, (self._next_closed, block_id))
            self._next_closed += 1
        if len(self._loose) > 2 * len(self.aside) + _SLACK:
            self._loose = [entry for entry in self._loose if self.aside.get(entry[1]) == entry[0]]
            heapify(self._loose)

    def _make_room(self, session: Session, chain: frozenset[int]) -> bool:
        """Takes one block from whoever would lose it first. False: that is the one for which there should be room."""
        while (first := self._first_with_blocks()) is not None:
            block_id = next(reversed(first.blocks))
            if first is session and block_id in chain:
                return False
            if first is not session and first.expires_s > session.expires_s:
                return False
            del first.blocks[block_id]
            if self._disown(block_id, first):
                return True
        return False

    def _first_with_blocks(self) -> Session | None:
        """The session that loses a block next."""
        while (session := self._with_blocks.first()) is not None and not session.blocks:
            self._with_blocks.pop()
        return session


class _Soonest:
    """Known sessions by the end of their time. A session is pushed whenever that changes; earlier entries do not count."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Session]] = []
        self._num_pushed = 0

    def push(self, session: Session) -> None:
        heappush(self._heap, (session.expires_s, self._num_pushed, session))
        self._num_pushed += 1

    def pop(self) -> None:
        heappop(self._heap)

    def first(self) -> Session | None:
        while self._heap:
            expires_s, _number, session = self._heap[0]
            if session.is_known and session.expires_s == expires_s:
                return session
            heappop(self._heap)
        return None

    def compact(self, sessions: dict[str, Session]) -> None:
        """Where most entries do not count any more, leaves one for each of ``sessions``."""
        if len(self._heap) > 2 * len(sessions) + _SLACK:
            self._heap.clear()
            for session in sessions.values():
                self.push(session)


def _first(block_ids: Iterable[int], among: Iterable[int], others: dict[int, None]) -> dict[int, None]:
    """``block_ids`` as far as they are ``among``, then ``others``."""
    known = among if isinstance(among, dict) else frozenset(among)
    ordered: dict[int, None] = {block_id: None for block_id in block_ids if block_id in known}
    ordered.update(others)
    return ordered
