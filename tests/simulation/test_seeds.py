"""The short run: many seeds, all invariants; and seeds that failed once."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from helpers.simulation.scenario import draw_scenario
from helpers.simulation.world import Outcome, run_seed

NUM_SEEDS = 200
CHUNK = 25

# Seeds that showed a mistake once, and which. Scenarios are drawn from the seed, so a change to what is drawn turns an entry
# into just another seed: what matters for good has a unit test of its own as well.
REGRESSIONS: dict[int, str] = {
    3: "a worker whose engine hangs is not replaced",
    254: "the same in a step of a kind that the worker has never done, whose length nobody can tell",
    689: "what an engine raises outlives the fault",
    4277: "one refused fetch closed the channel under another, whose request then waited for ever",
    6788: "a receipt tells the workers' end where the client stopped at a token that came together with it",
    40388: "a worker whose step hangs is drained, and says what it gave up waiting for",
}


def assert_fine(outcome: Outcome) -> None:
    again = f"PYTHONPATH=tests python -m helpers.simulation --seed {outcome.seed} --trace"
    assert not outcome.problems, "\n".join([*outcome.problems, f"seed {outcome.seed}, again: {again}"])


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, CHUNK))
def test_no_invariant_is_violated(first: int) -> None:
    ends: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        outcome = run_seed(seed)
        assert_fine(outcome)
        ends += outcome.ends
    assert ends["stop"] + ends["length"] > CHUNK, "hardly a request was served, so hardly anything was tried"


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_what_failed_once_does_not_fail_again(seed: int) -> None:
    assert_fine(run_seed(seed))


@pytest.mark.parametrize("seed", [1, 2])
def test_without_faults_every_request_is_served(seed: int) -> None:
    outcome = run_seed(seed, make=functools.partial(draw_scenario, num_faults=0))
    assert_fine(outcome)
    assert set(outcome.ends) <= {"stop", "length", "stopped", "left"}
