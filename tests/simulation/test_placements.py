"""Whether the adaptive placement is as good as the best of the others, on virtual time: real schedulers, router, learning."""

from __future__ import annotations

import random

import pytest
from helpers.placement_world import Ask, Machine, PlacementWorld

from baton.load.goodput_grid import Pair, Took, attainment, goodput
from baton.services.core.candidates import Placement, Role

MACHINE = Machine()
MEAN_INPUT, MEAN_OUTPUT = 280, 70
ALONE = Pair(MACHINE.step_s + MEAN_INPUT * MACHINE.token_s, MACHINE.step_s + MACHINE.stream_s)
POOLS = (Role.PREFILL, Role.DECODE)
POLICIES = {
    "colocated": ((Role.COLOCATED, Role.COLOCATED), Placement.AUTO),
    "remote": (POOLS, Placement.REMOTE),
    "local": (POOLS, Placement.LOCAL),
    "adaptive": (POOLS, Placement.AUTO),
}
RATES = (4.0, 6.5, 9.0, 11.5, 13.0)
NUM_REQUESTS = 48


def asks(rate: float, promise: Pair) -> list[Ask]:
    """The same requests at every rate: prompts and answers of a chat service, most of them short."""
    rng = random.Random(7)
    at_s, made = 0.0, []
    for _ in range(NUM_REQUESTS):
        at_s += rng.expovariate(rate)
        lengths = [max(4, round(mean * rng.lognormvariate(-0.32, 0.8))) for mean in (MEAN_INPUT, MEAN_OUTPUT)]
        made.append(Ask(at_s, *lengths, *promise))
    return made


def goodputs(pair: Pair) -> dict[str, float]:
    """Of every policy."""
    found = {}
    for policy, (roles, placement) in POLICIES.items():
        shares = {}
        for rate in RATES:
            stories = PlacementWorld(roles, placement, MACHINE).run(asks(rate, pair))
            assert all(story.first_s is not None for story in stories)
            shares[rate] = attainment([Took(story.ttft_s, story.tpot_s) for story in stories], pair)
            if shares[rate] < 0.9:
                break
        found[policy] = goodput(shares)
    return found


@pytest.mark.parametrize("tpot_factor", [2.0, 6.0], ids=["strict", "lenient"])
def test_the_adaptive_placement_is_as_good_as_the_best(tpot_factor: float) -> None:
    found = goodputs(Pair(15 * ALONE.ttft_s, tpot_factor * ALONE.tpot_s))
    best = max(found["colocated"], found["remote"], found["local"])
    assert best > 0.0, found
    assert found["adaptive"] >= 0.95 * best, found
    if tpot_factor == 2.0:
        assert found["adaptive"] > 1.2 * found["colocated"], found
