"""The blocks of a KV cache: who holds them, what they are called, which one is reused next, and a ledger of it all.

A block has two possible owners at once, requests and transfers, each with a count of its own. It is in exactly one state:

    state       request refs  transfer refs  name     reusable
    request     > 0           any            any      no
    transfer    0             > 0            any      no
    quarantine  0             0              none     no: a write could still land in it
    cached      0             0              known    yes, least recently used first
    free        0             0              none     yes, before any cached one

Reuse order is exact: blocks that hold nothing, then cached blocks by the time their last holder let go. A holder lets
go of its blocks tail first, so a chain loses its tail before its shared head. Every operation is O(1) a block. Of several
tenants the one gives a cached block that has most for its weight (``cache_share``, O(log tenants)); where conversations
keep blocks, ``retention`` says which of its own is next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from baton.services.core.block_state import Block, BlockCounts, BlockState, Hold, LedgerEntry, NameEvents, Owner
from baton.services.core.cache_share import CacheShare, CacheShares
from baton.services.core.retention import Retention


class BlockPool:
    """A fixed number of blocks with ids from 0. Not thread-safe: one thread owns it."""

    def __init__(self, num_blocks: int, block_size: int, max_kept_blocks: int = 0) -> None:
        """``max_kept_blocks``: how many of them conversations may keep."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {num_blocks} blocks of {block_size} tokens")
        self.block_size = block_size
        self.now_s = 0.0  # the owner's clock when it last looked; holders are stamped with it
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was freed last is used first
        self._by_name: dict[bytes, int] = {}
        self._quarantine: dict[int, Hold] = {}
        self._holds: set[Hold] = set()  # those that hold blocks
        self._num_request = 0
        self._num_transfer = 0
        self._num_cached = 0
        self._changed_names: dict[bytes, bool] = {}  # name -> it can be found
        self.shares = CacheShares()
        self.retention = Retention(
            max_kept_blocks, num_blocks, self.shares, lambda block_id: self._blocks[block_id].share
        )
        self.num_evicted_for_own = 0  # cached blocks that made room for their own tenant
        self.num_evicted_for_others = 0

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` can give out now, evicting cached ones where it must."""
        return len(self._free) + self._num_cached

    # Taking and letting go

    def allocate(self, num_blocks: int, hold: Hold) -> list[int]:
        """Give ``num_blocks`` reusable blocks, each of a new generation, to ``hold``.

        Raises ValueError where fewer are available; then nothing has changed.
        """
        if num_blocks > self.num_available:
            raise ValueError(f"{num_blocks} blocks wanted, {self.num_available} of {self.num_blocks} available")
        if not num_blocks:
            return []
        free, blocks = self._free, self._blocks
        is_request = hold.owner is Owner.REQUEST
        # What it is about to have counts already: whoever asks for more than its share makes room itself.
        share = self.shares.of(hold.tenant, hold.weight)
        share.num_blocks += num_blocks
        self.shares.by_blocks.raised(share)
        if num_blocks > len(free):
            self.retention.lapse(self.now_s)
        taken: list[int] = []
        for _ in range(num_blocks):
            if free:
                block_id = free.pop()
                block = blocks[block_id]
            else:
                block_id = self._evict(share)
                block = blocks[block_id]
            block.share = share
            block.generation += 1
            if is_request:
                block.request_refs = 1
                block.request_hold = hold
            else:
                block.transfer_refs = 1
                block.transfer_hold = hold
            taken.append(block_id)
        if is_request:
            self._num_request += num_blocks
        else:
            self._num_transfer += num_blocks
        self._count(hold, num_blocks)
        return taken

    def acquire(self, block_ids: Sequence[int], hold: Hold) -> None:
        """Add ``hold`` to blocks that are cached or held already."""
        is_request = hold.owner is Owner.REQUEST
        for block_id in block_ids:
            block = self._blocks[block_id]
            if not block.request_refs and not block.transfer_refs:
                share = block.share
                if share is not None and block_id in share.cached:
                    del share.cached[block_id]
                elif share is None or share.aside.pop(block_id, None) is None:
                    raise ValueError(f"block {block_id} holds nothing that could be shared")
                self._num_cached -= 1
                if is_request:
                    self._num_request += 1
                else:
                    self._num_transfer += 1
            elif is_request and not block.request_refs:
                self._num_transfer -= 1
                self._num_request += 1
            if is_request:
                block.request_refs += 1
                block.request_hold = hold
            else:
                block.transfer_refs += 1
                block.transfer_hold = hold
        self._count(hold, len(block_ids))

    def release(self, block_ids: Sequence[int], hold: Hold) -> None:
        """Let ``hold`` go of blocks, in the order of their chain. What nobody holds any more becomes cached, or free."""
        blocks = self._blocks
        is_request = hold.owner is Owner.REQUEST
        self._count(hold, -len(block_ids))
        for block_id in reversed(block_ids):
            block = blocks[block_id]
            if is_request:
                if not block.request_refs:
                    raise ValueError(f"no request holds block {block_id}, which {hold} lets go")
                block.request_refs -= 1
                if block.request_refs:
                    continue
                block.request_hold = None
                self._num_request -= 1
                if block.transfer_refs:
                    self._num_transfer += 1
                    continue
            else:
                if not block.transfer_refs:
                    raise ValueError(f"no transfer holds block {block_id}, which {hold} lets go")
                block.transfer_refs -= 1
                if block.transfer_refs:
                    continue
                block.transfer_hold = None
                if block.request_refs:
                    continue
                self._num_transfer -= 1
            if block.name is None:
                self._set_free(block_id)
                continue
            share = block.share
            assert share is not None
            share.cached[block_id] = None
            self._num_cached += 1
            if len(share.cached) == 1:
                self.shares.by_blocks.raised(share)
        if hold.session is not None:
            named = [block_id for block_id in block_ids if blocks[block_id].name is not None]
            self.retention.keep(hold.session, named, self.now_s)

    def quarantine(self, block_ids: Sequence[int], hold: Hold) -> None:
        """Take blocks from a transfer that gave up while writes could still land. They stay out of use, ``hold`` with them.

        Raises ValueError for a block that is not this transfer's alone, and for a named one: a name is given only
        after the last write.
        """
        for block_id in block_ids:
            block = self._blocks[block_id]
            if (
                block.request_refs
                or block.transfer_refs != 1
                or block.transfer_hold is not hold
                or block.name is not None
            ):
                raise ValueError(f"block {block_id} is not {hold}'s alone and unnamed")
        for block_id in block_ids:
            block = self._blocks[block_id]
            block.transfer_refs = 0
            block.transfer_hold = None
            self._quarantine[block_id] = hold
        hold.since_s = self.now_s
        self._num_transfer -= len(block_ids)

    def release_quarantine(self, block_ids: Sequence[int]) -> None:
        """No write can land any more: the blocks are free."""
        for block_id in reversed(block_ids):
            hold = self._quarantine.pop(block_id, None)
            if hold is None:
                raise ValueError(f"block {block_id} is not in quarantine")
            self._count(hold, -1)
            self._set_free(block_id)

    # Names

    def name_block(self, block_id: int, name: bytes) -> bool:
        """Call a held block ``name`` from now on, in place of an earlier name. Its contents must not change any more.

        False, and no name, where another block is called so already: of two equal blocks one is enough.
        """
        block = self._blocks[block_id]
        if not block.request_refs and not block.transfer_refs:
            raise ValueError(f"block {block_id} is held by nobody")
        if block.name == name:
            return True
        self._forget_name(block)
        if name in self._by_name:
            self.retention.forget(block_id)
            return False
        block.name = name
        self._by_name[name] = block_id
        self._changed_names[name] = True
        return True

    def lookup(self, names: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix of ``names`` that is here. Changes nothing; ``acquire`` makes them stay."""
        find = self._by_name.get
        found: list[int] = []
        for name in names:
            block_id = find(name)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def names(self) -> tuple[bytes, ...]:
        """All names that can be found now: the snapshot that a listener needs after it missed events."""
        return tuple(self._by_name)

    def take_events(self) -> NameEvents:
        """Changes of names since the last call. A name that came and went is reported as removed."""
        changed, self._changed_names = self._changed_names, {}
        return NameEvents(
            stored=tuple(name for name, is_here in changed.items() if is_here),
            removed=tuple(name for name, is_here in changed.items() if not is_here),
        )

    def clear_cache(self) -> int:
        """Forget every cached block; how many. Blocks that are held keep their names."""
        cached = [block_id for share in self.shares for block_id in (*share.aside, *share.cached)]
        for share in self.shares:
            share.cached.clear()
            share.aside.clear()
        for block_id in reversed(cached):
            self.retention.forget(block_id)
            self._forget_name(self._blocks[block_id])
            self._set_free(block_id)
        self._num_cached = 0
        return len(cached)

    # The ledger

    def generation(self, block_id: int) -> int:
        """How often the block was given out. What was meant for another generation must not touch it."""
        return self._blocks[block_id].generation

    def is_idle(self, block_id: int) -> bool:
        """Nobody holds the block, so that acquiring it takes it out of ``num_available``."""
        block = self._blocks[block_id]
        return not block.request_refs and not block.transfer_refs

    def counts(self) -> BlockCounts:
        """Blocks by state, from running counters. Their sum is the total, or there is a bug: ``BlockCounts.error``."""
        return BlockCounts(
            total=len(self._blocks),
            free=len(self._free),
            cached=self._num_cached,
            request=self._num_request,
            transfer=self._num_transfer,
            quarantine=len(self._quarantine),
        )

    def overdue(self, now: float) -> int:
        """Blocks held past the deadline of their holder; a block with two such holders counts twice."""
        return sum(h.num_blocks for h in self._holds if h.deadline_s is not None and h.deadline_s < now)

    def ledger(self, first_block_id: int = 0) -> Iterator[LedgerEntry]:
        """Every block that is not free, with its holders, in the order of ids."""
        for block_id in range(first_block_id, len(self._blocks)):
            block = self._blocks[block_id]
            state = self._state(block_id)
            if state is BlockState.FREE:
                continue
            transfer = block.transfer_hold or self._quarantine.get(block_id)
            deadlines = [h.deadline_s for h in (block.request_hold, transfer) if h and h.deadline_s is not None]
            yield LedgerEntry(
                block_id=block_id,
                state=state,
                generation=block.generation,
                name=block.name,
                request_refs=block.request_refs,
                transfer_refs=block.transfer_refs,
                request_id=block.request_hold.holder if block.request_hold else None,
                handoff=transfer.holder if transfer else None,
                deadline_s=min(deadlines, default=None),
                since_s=max((h.since_s for h in (block.request_hold, transfer) if h), default=None),
            )

    def check_integrity(self) -> int:
        """Walk all blocks and compare with every counter, list and index. Returns total minus the sum of the states.

        Raises RuntimeError naming the first blocks or counts that contradict each other.
        """
        for contradiction in self.contradictions():
            raise RuntimeError(contradiction)
        return self.counts().error

    def contradictions(self) -> Iterator[str]:
        """What a recount finds that is not as the counters, lists and indices say, with the ids of the blocks."""
        states = [self._state(block_id) for block_id in range(len(self._blocks))]
        counts = self.counts()
        for state, num in Counter(dict.fromkeys(BlockState, 0) | Counter(states)).items():
            if counts.by_state(state) != num:
                yield f"{num} blocks are in state {state}, but {counts.by_state(state)} are counted"
        cached = [block_id for share in self.shares for block_id in (*share.cached, *share.aside)]
        for state, listed in ((BlockState.FREE, self._free), (BlockState.CACHED, cached)):
            in_state = {block_id for block_id, its in enumerate(states) if its is state}
            if wrong := sorted(in_state.symmetric_difference(listed)):
                yield f"blocks {_some(wrong)} are {state}, or in the list of {state} blocks, but not both"
            elif len(listed) != len(in_state):
                twice = sorted(block_id for block_id, times in Counter(listed).items() if times > 1)
                yield f"the list of {state} blocks has {_some(twice)} twice"
        named = {block_id: block.name for block_id, block in enumerate(self._blocks) if block.name is not None}
        if wrong := sorted(block_id for block_id, name in named.items() if self._by_name.get(name) != block_id):
            yield f"blocks {_some(wrong)} have names that find other blocks"
        if len(self._by_name) != len(named):
            yield f"{len(self._by_name)} names are known for {len(named)} named blocks"
        yield from self.shares.contradictions([block.share for block in self._blocks])
        yield from self.retention.contradictions(named, cached)
        num_refs = sum(block.request_refs + block.transfer_refs for block in self._blocks)
        if (held := sum(h.num_blocks for h in self._holds)) != num_refs + len(self._quarantine):
            yield f"holders count {held} blocks, the blocks {num_refs} + {len(self._quarantine)} references"

    def _evict(self, for_share: CacheShare) -> int:
        """A cached block that is nobody's any more."""
        share = self.shares.next_to_give()
        block_id = self.retention.take(share)
        self._forget_name(self._blocks[block_id])
        self._num_cached -= 1
        share.num_blocks -= 1
        if share is for_share:
            self.num_evicted_for_own += 1
        else:
            self.num_evicted_for_others += 1
            self.shares.tidy(share)
        return block_id

    def _set_free(self, block_id: int) -> None:
        block = self._blocks[block_id]
        share, block.share = block.share, None
        assert share is not None
        share.num_blocks -= 1
        if not share.num_blocks:
            self.shares.tidy(share)
        self._free.append(block_id)

    def _state(self, block_id: int) -> BlockState:
        block = self._blocks[block_id]
        if block_id in self._quarantine:
            return BlockState.QUARANTINE
        if block.request_refs:
            return BlockState.REQUEST
        if block.transfer_refs:
            return BlockState.TRANSFER
        return BlockState.FREE if block.name is None else BlockState.CACHED

    def _count(self, hold: Hold, change: int) -> None:
        if hold.num_blocks + change < 0:
            raise ValueError(f"{hold} has {hold.num_blocks} blocks and lets {-change} go")
        if not hold.num_blocks:
            hold.since_s = self.now_s
        hold.num_blocks += change
        if hold.num_blocks:
            self._holds.add(hold)
        else:
            self._holds.discard(hold)

    def _forget_name(self, block: Block) -> None:
        if block.name is not None:
            del self._by_name[block.name]
            self._changed_names[block.name] = False
            block.name = None


def _some(block_ids: Sequence[int], most: int = 10) -> str:
    shown = ", ".join(map(str, block_ids[:most]))
    return shown if len(block_ids) <= most else f"{shown} and {len(block_ids) - most} more"
