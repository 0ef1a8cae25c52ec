"""Both machines joined by a network that drops, duplicates and reorders, with corrupt blocks, broken links and late writes."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers import kv_names as kv
from helpers.kv_pair import Faults, PairWorld

from baton.kvtransfer.protocol import ReceiverState, SenderState

NUM_SEEDS = 300

WORLDS = [
    pytest.param(Faults(), id="reordered only"),
    pytest.param(Faults(duplicate=0.3), id="duplicated"),
    pytest.param(Faults(drop=0.1), id="dropped"),
    pytest.param(Faults(corrupt=0.2), id="corrupt"),
    pytest.param(Faults(link_loss=0.05), id="links break"),
    pytest.param(Faults(give_up=0.03), id="given up"),
    pytest.param(Faults(peer_loss=0.03), id="peers lost"),
    pytest.param(Faults(0.05, 0.1, 0.05, 0.02, 0.01, 0.01, 0.1), id="everything"),
]


def run(seed: int, faults: Faults) -> PairWorld:
    world = PairWorld(seed, num_blocks=1 + seed % 5, faults=faults)
    world.run()
    return world


@pytest.mark.parametrize("faults", WORLDS)
def test_every_handoff_ends_once_on_each_side_and_nothing_is_read_or_reused_too_early(faults: Faults) -> None:
    ends: Counter[tuple[SenderState, ReceiverState]] = Counter()
    for seed in range(NUM_SEEDS):
        world = run(seed, faults)
        ends[world.sender.state, world.receiver.state] += 1
        assert len(world.sender_done) == 1, seed
        assert len(world.receiver_done) == (world.receiver.state is not ReceiverState.IDLE), seed
        assert world.adopted <= 1, seed
        if world.receiver.state is ReceiverState.ACKED:
            assert world.released == [], seed
            assert all(world.memory[slot.block_id] == kv.checksum(slot.index) for slot in world.receiver.slots.values())
        elif world.receiver.slots:
            assert world.released in ([True], [False, True]), seed
            assert not world.owned, seed
        if world.sender.state is SenderState.ACKED:
            assert world.receiver.state is ReceiverState.ACKED, seed
    # The runs did what their name says: some handed over, and with faults some did not.
    assert ends[SenderState.ACKED, ReceiverState.ACKED] > 0
    if faults == Faults():
        assert set(ends) == {(SenderState.ACKED, ReceiverState.ACKED)}
    elif faults not in (Faults(duplicate=0.3),):
        assert ends[SenderState.FAILED, ReceiverState.CLOSED] > 0


def test_duplicates_alone_never_make_a_handoff_fail() -> None:
    for seed in range(NUM_SEEDS):
        world = run(seed, Faults(duplicate=0.4))
        assert (world.sender.state, world.receiver.state) == (SenderState.ACKED, ReceiverState.ACKED), seed


def test_a_seed_replays_exactly() -> None:
    faults = WORLDS[-1].values[0]
    assert isinstance(faults, Faults)
    one, two = run(11, faults), run(11, faults)
    assert (one.now, one.memory, one.released, one.sender.state) == (
        two.now,
        two.memory,
        two.released,
        two.sender.state,
    )
