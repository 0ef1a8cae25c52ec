"""A pool that tenants share: whoever has most for its weight gives a block, the one that it would give if it were alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import BlockState, Hold, Owner
from baton.services.core.sessions import SessionTag

NUM_BLOCKS, MAX_KEPT = 12, 5
WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0}
TENANTS = st.sampled_from(sorted(WEIGHTS))
OWNERS = st.sampled_from(Owner)


@dataclass(eq=False)
class Holder:
    hold: Hold
    blocks: list[int]


class CacheShareMachine(RuleBasedStateMachine):
    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 16, MAX_KEPT)
        self.owner: dict[int, str] = {}  # of every block that is not free
        self.lru: list[int] = []  # idle blocks, least recently used first
        self.num_holders = 0
        self.num_named = 0

    def level(self, tenant: str) -> float:
        return Counter(self.owner.values())[tenant] / WEIGHTS[tenant]

    def is_kept(self, block_id: int) -> bool:
        sessions = (self.pool.retention.get(f"{tenant}/s", self.pool.now_s) for tenant in WEIGHTS)
        return any(session is not None and block_id in session.blocks for session in sessions)

    def hold(self, owner: Owner, tenant: str) -> Hold:
        self.num_holders += 1
        return Hold(owner, str(self.num_holders), tenant=tenant, weight=WEIGHTS[tenant])

    @rule(
        target=holders, count=st.integers(0, 6), owner=OWNERS, tenant=TENANTS, session_ttl_s=st.none() | st.just(20.0)
    )
    def allocate(self, count: int, owner: Owner, tenant: str, session_ttl_s: float | None) -> Holder:
        pool, hold = self.pool, self.hold(owner, tenant)
        if owner is Owner.REQUEST and session_ttl_s is not None:
            tag = SessionTag(f"{tenant}/s", session_ttl_s)
            hold.session = pool.retention.open(tag, pool.now_s, tenant, WEIGHTS[tenant])
        if count > pool.num_available:
            return Holder(hold, [])
        num_free = pool.counts().free
        kept = {block_id for block_id in self.lru if self.is_kept(block_id)}
        idle = list(self.lru)
        blocks = pool.allocate(count, hold)
        evicted = blocks[num_free:]
        # One after the other, as if nothing of this were written down anywhere.
        wanting = Counter(self.owner.values())
        wanting[tenant] += count
        for block_id in evicted:
            levels = {self.owner[b]: wanting[self.owner[b]] / WEIGHTS[self.owner[b]] for b in idle}
            giver = self.owner[block_id]
            assert block_id in idle, "in use"
            assert levels[giver] == max(levels.values()), "another tenant has more"
            own = [b for b in idle if self.owner[b] == giver]
            loose = [b for b in own if b not in kept]
            assert block_id == loose[0] if loose else block_id in own, "not its next one"
            idle.remove(block_id)
            wanting[giver] -= 1
        self.lru = idle
        self.owner.update(dict.fromkeys(blocks, tenant))
        return Holder(hold, blocks)

    @rule(holder=holders)
    def name(self, holder: Holder) -> None:
        for block_id in holder.blocks:
            self.num_named += 1
            self.pool.name_block(block_id, self.num_named.to_bytes(16, "big"))

    @rule(target=holders, owner=OWNERS, tenant=TENANTS, data=st.data())
    def reuse(self, owner: Owner, tenant: str, data: st.DataObject) -> Holder:
        """Hits: of its own blocks, idle or in use."""
        hold = self.hold(owner, tenant)
        named = [e.block_id for e in self.pool.ledger() if e.name is not None and self.owner[e.block_id] == tenant]
        hits = data.draw(st.lists(st.sampled_from(named), unique=True, max_size=3)) if named else []
        self.pool.acquire(hits, hold)
        self.lru = [block_id for block_id in self.lru if block_id not in hits]
        return Holder(hold, hits)

    @rule(holder=consumes(holders))
    def release(self, holder: Holder) -> None:
        self.pool.release(holder.blocks, holder.hold)
        states = {entry.block_id: entry.state for entry in self.pool.ledger()}
        for block_id in reversed(holder.blocks):
            state = states.get(block_id, BlockState.FREE)
            if state is BlockState.FREE:
                del self.owner[block_id]
            elif state is BlockState.CACHED:
                self.lru.append(block_id)

    @rule(holder=consumes(holders))
    def give_up(self, holder: Holder) -> None:
        """A transfer whose writes may still land."""
        entries = {entry.block_id: entry for entry in self.pool.ledger()}
        alone = (1, 0, None)
        if any((entries[b].transfer_refs, entries[b].request_refs, entries[b].name) != alone for b in holder.blocks):
            self.release(holder)
            return
        self.pool.quarantine(holder.blocks, holder.hold)
        self.pool.check_integrity()
        self.pool.release_quarantine(holder.blocks)
        for block_id in holder.blocks:
            del self.owner[block_id]

    @rule(seconds=st.sampled_from([5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.pool.now_s += seconds

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()
        for block_id in self.lru:
            del self.owner[block_id]
        self.lru = []

    @invariant()
    def the_ledger_agrees(self) -> None:
        assert self.pool.check_integrity() == 0
        assert self.pool.retention.num_kept <= MAX_KEPT
        counted = {share.tenant: share.num_blocks for share in self.pool.shares if share.num_blocks}
        assert counted == dict(Counter(self.owner.values()))
        assert sum(counted.values()) == NUM_BLOCKS - self.pool.counts().free

    def teardown(self) -> None:
        num_available = self.pool.num_available
        assert len(self.pool.allocate(num_available, Hold(Owner.REQUEST, "last", tenant="a"))) == num_available


TestCacheShare = CacheShareMachine.TestCase
TestCacheShare.settings = settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True)
