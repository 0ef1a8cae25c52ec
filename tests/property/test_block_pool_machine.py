"""The block pool against a model that is slow and obvious: same blocks, same order of reuse, same names, same counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import BlockState, Hold, Owner

NUM_BLOCKS = 9
NAMES = st.integers(0, 11).map(lambda index: index.to_bytes(16, "big"))


@dataclass(eq=False)
class Holder:
    hold: Hold
    blocks: list[int]


@dataclass
class ModelBlock:
    holders: Counter[Owner] = field(default_factory=Counter)
    name: bytes | None = None
    generation: int = 0
    quarantined: bool = False

    @property
    def state(self) -> BlockState:
        if self.quarantined:
            return BlockState.QUARANTINE
        if self.holders[Owner.REQUEST]:
            return BlockState.REQUEST
        if self.holders[Owner.TRANSFER]:
            return BlockState.TRANSFER
        return BlockState.FREE if self.name is None else BlockState.CACHED


class BlockPoolMachine(RuleBasedStateMachine):
    holders = Bundle("holders")
    quarantines = Bundle("quarantines")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 16)
        self.model = [ModelBlock() for _ in range(NUM_BLOCKS)]
        self.reuse: list[int] = list(range(NUM_BLOCKS))  # the order in which blocks are given out
        self.listener: set[bytes] = set()  # what somebody knows who only sees the events
        self.num_holders = 0

    def named(self, name: bytes) -> int | None:
        return next((block_id for block_id, block in enumerate(self.model) if block.name == name), None)

    @rule(
        target=holders,
        count=st.integers(0, 5),
        owner=st.sampled_from(Owner),
        deadline=st.sampled_from([None, 1.0, 2.0]),
    )
    def allocate(self, count: int, owner: Owner, deadline: float | None) -> Holder:
        self.num_holders += 1
        holder = Holder(Hold(owner, str(self.num_holders), deadline), [])
        if count > len(self.reuse):
            with pytest.raises(ValueError, match="available"):
                self.pool.allocate(count, holder.hold)
            return holder
        expected, self.reuse = self.reuse[:count], self.reuse[count:]
        holder.blocks = self.pool.allocate(count, holder.hold)
        assert holder.blocks == expected
        for block_id in expected:
            block = self.model[block_id]
            block.name = None
            block.generation += 1
            block.holders[owner] = 1
        return holder

    @rule(target=holders, names=st.lists(NAMES, max_size=4, unique=True), owner=st.sampled_from(Owner))
    def share(self, names: list[bytes], owner: Owner) -> Holder:
        expected = []
        for name in names:
            if (found := self.named(name)) is None:
                break
            expected.append(found)
        assert self.pool.lookup(names) == expected
        self.num_holders += 1
        holder = Holder(Hold(owner, str(self.num_holders)), expected)
        self.pool.acquire(expected, holder.hold)
        for block_id in expected:
            self.model[block_id].holders[owner] += 1
            if block_id in self.reuse:
                self.reuse.remove(block_id)
        return holder

    @rule(holder=holders, index=st.integers(0, 4), name=NAMES)
    def name_block(self, holder: Holder, index: int, name: bytes) -> None:
        if index >= len(holder.blocks):
            return
        block = self.model[holder.blocks[index]]
        other = self.named(name)
        is_named = self.pool.name_block(holder.blocks[index], name)
        assert is_named == (other in (None, holder.blocks[index]))
        block.name = name if is_named else None

    @rule(holder=holders, keep=st.integers(0, 3))
    def release(self, holder: Holder, keep: int) -> None:
        """Lets go of all blocks behind the first ``keep``, which a holder may do in several steps."""
        let_go = holder.blocks[keep:]
        del holder.blocks[keep:]
        self.pool.release(let_go, holder.hold)
        for block_id in reversed(let_go):
            block = self.model[block_id]
            block.holders[holder.hold.owner] -= 1
            if block.state is BlockState.FREE:
                self.reuse.insert(0, block_id)
            elif block.state is BlockState.CACHED:
                self.reuse.append(block_id)

    @rule(target=quarantines, holder=consumes(holders))
    def quarantine(self, holder: Holder) -> Holder:
        blocks = [self.model[block_id] for block_id in holder.blocks]
        is_alone = all(b.holders == Counter({Owner.TRANSFER: 1}) and b.name is None for b in blocks)
        if holder.hold.owner is Owner.REQUEST or not is_alone:
            if holder.blocks:
                with pytest.raises(ValueError, match="alone"):
                    self.pool.quarantine(holder.blocks, holder.hold)
            self.release(holder, 0)
            return Holder(holder.hold, [])
        self.pool.quarantine(holder.blocks, holder.hold)
        for block in blocks:
            block.holders.clear()
            block.quarantined = True
        return holder

    @rule(holder=consumes(quarantines))
    def release_quarantine(self, holder: Holder) -> None:
        self.pool.release_quarantine(holder.blocks)
        for block_id in reversed(holder.blocks):
            self.model[block_id].quarantined = False
            self.reuse.insert(0, block_id)

    @precondition(lambda self: any(block.state is BlockState.CACHED for block in self.model))
    @rule()
    def clear_cache(self) -> None:
        cached = [block_id for block_id in self.reuse if self.model[block_id].state is BlockState.CACHED]
        assert self.pool.clear_cache() == len(cached)
        for block_id in cached:
            self.model[block_id].name = None
        self.reuse = cached + [block_id for block_id in self.reuse if block_id not in cached]

    @rule()
    def listen(self) -> None:
        events = self.pool.take_events()
        assert not set(events.stored) & set(events.removed)
        self.listener = (self.listener | set(events.stored)) - set(events.removed)
        assert self.listener == {block.name for block in self.model if block.name is not None}

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        assert self.pool.check_integrity() == 0
        counts = self.pool.counts()
        expected = Counter(block.state for block in self.model)
        assert {state: counts.by_state(state) for state in BlockState} == {s: expected[s] for s in BlockState}
        assert self.pool.num_available == len(self.reuse)

    @invariant()
    def names_and_generations_agree(self) -> None:
        assert set(self.pool.names()) == {block.name for block in self.model if block.name is not None}
        assert [self.pool.generation(block_id) for block_id in range(NUM_BLOCKS)] == [b.generation for b in self.model]
        for entry in self.pool.ledger():
            block = self.model[entry.block_id]
            assert (entry.state, entry.name) == (block.state, block.name)
            assert entry.request_refs == block.holders[Owner.REQUEST]
            assert entry.transfer_refs == block.holders[Owner.TRANSFER]

    def teardown(self) -> None:
        """Giving everything out shows the rest of the order."""
        assert self.pool.allocate(len(self.reuse), Hold(Owner.REQUEST, "last")) == self.reuse


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=70, stateful_step_count=50, deadline=None, derandomize=True)
