"""A pool whose blocks conversations keep: what is reused next follows from who keeps what, and nothing is locked or lost."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import BlockState, Hold, Owner
from baton.services.core.sessions import SessionTag

NUM_BLOCKS, MAX_KEPT = 10, 4
# Three conversations; of one every chain is another, which is what a closed session is for.
KEYS = st.sampled_from(["a", "b", "c"])
TTLS = st.sampled_from([3.0, 10.0])
# Prompts with shared beginnings: the name of a block tells all tokens before it.
CHAINS = st.lists(st.integers(0, 1), min_size=1, max_size=5)


def names_of(chain: list[int]) -> list[bytes]:
    return [bytes([1, *chain[: index + 1]]) for index in range(len(chain))]


@dataclass(eq=False)
class Turn:
    hold: Hold
    blocks: list[int]


class RetentionMachine(RuleBasedStateMachine):
    turns = Bundle("turns")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 16, MAX_KEPT)
        self.retention = self.pool.retention
        self.let_go: dict[int, int] = {}  # when each block became idle, as a count
        self.dismissed: list[int] = []  # idle blocks of closed sessions, first to go first
        self.num_let_go = 0
        self.num_turns = 0

    def kept(self) -> set[int]:
        sessions = (self.retention.get(key, self.pool.now_s) for key in "abc")
        return {block_id for session in sessions if session is not None for block_id in session.blocks}

    def idle(self) -> list[int]:
        entries = [entry for entry in self.pool.ledger() if entry.state is BlockState.CACHED]
        return sorted((entry.block_id for entry in entries), key=self.let_go.__getitem__)

    def expect_order(self, num_blocks: int, hold: Hold) -> list[int]:
        """Allocates, and compares with what follows from who keeps what."""
        kept, idle = self.kept(), self.idle()
        num_free = self.pool.counts().free
        loose = [b for b in self.dismissed if b in idle]
        loose += [b for b in idle if b not in kept and b not in loose]
        taken = self.pool.allocate(num_blocks, hold)
        evicted = taken[num_free:]
        assert evicted[: len(loose)] == loose[: len(evicted)]
        assert set(evicted[len(loose) :]) <= kept
        self.dismissed = [b for b in self.dismissed if b not in taken]
        return taken

    @rule(target=turns, chain=CHAINS, key=st.none() | KEYS, ttl_s=TTLS)
    def begin(self, chain: list[int], key: str | None, ttl_s: float) -> Turn:
        """A request that finds what is there of its prompt, and computes the rest."""
        self.num_turns += 1
        hold = Hold(Owner.REQUEST, str(self.num_turns))
        names = names_of(chain)
        hits = self.pool.lookup(names)
        num_new = len(chain) - len(hits)
        if num_new + sum(map(self.pool.is_idle, hits)) > self.pool.num_available:
            return Turn(hold, [])
        if key is not None:
            hold.session = self.retention.open(SessionTag(key, ttl_s), self.pool.now_s)
        self.pool.acquire(hits, hold)
        self.dismissed = [b for b in self.dismissed if b not in hits]
        blocks = hits + self.expect_order(num_new, hold)
        for block_id, name in zip(blocks, names, strict=True):
            self.pool.name_block(block_id, name)
        return Turn(hold, blocks)

    @rule(turn=consumes(turns))
    def end(self, turn: Turn) -> None:
        self.pool.release(turn.blocks, turn.hold)
        idle = {entry.block_id for entry in self.pool.ledger() if entry.state is BlockState.CACHED}
        let_go = [b for b in reversed(turn.blocks) if b in idle]
        for block_id in let_go:
            self.num_let_go += 1
            self.let_go[block_id] = self.num_let_go
        if turn.hold.session is not None and turn.hold.session.is_closed:
            kept = self.kept()
            self.dismissed += [b for b in let_go if b not in kept]

    @rule(key=KEYS)
    def close(self, key: str) -> None:
        session = self.retention.get(key, self.pool.now_s)
        blocks = [] if session is None else list(reversed(session.blocks))
        assert self.retention.close(key, self.pool.now_s) == (session is not None)
        assert not self.retention.close(key, self.pool.now_s)
        kept, idle = self.kept(), set(self.idle())
        self.dismissed += [b for b in blocks if b not in kept and b in idle]

    @rule(seconds=st.sampled_from([1.0, 4.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.pool.now_s += seconds

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()
        self.dismissed = []

    @invariant()
    def the_budget_holds_and_the_ledger_agrees(self) -> None:
        assert self.retention.num_kept <= MAX_KEPT
        assert self.pool.check_integrity() == 0
        counts = self.pool.counts()
        assert self.pool.num_available == counts.free + counts.cached == NUM_BLOCKS - counts.request

    def teardown(self) -> None:
        """All of it can be given out, whoever keeps it: first what is free or nobody's, then what is kept."""
        num_available = self.pool.num_available
        assert len(self.expect_order(num_available, Hold(Owner.REQUEST, "last"))) == num_available
        assert self.retention.num_kept <= self.pool.counts().request


TestRetention = RetentionMachine.TestCase
TestRetention.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
