"""When a worker's quarantine is too much, and when that has lasted too long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.services.core.quarantine import QuarantineBudget, QuarantineLimits, Standing

LIMITS = QuarantineLimits(share=0.1, replace_after_s=60.0)


def budget() -> QuarantineBudget:
    return QuarantineBudget(100, LIMITS)


@pytest.mark.parametrize(("share", "num_blocks", "most"), [(0.1, 100, 10), (0.1, 9, 1), (0.25, 10, 2), (1.0, 7, 7)])
def test_the_budget_is_a_share_of_the_pool_and_at_least_one_block(share: float, num_blocks: int, most: int) -> None:
    assert QuarantineBudget(num_blocks, QuarantineLimits(share)).max_num_blocks == most


def test_up_to_the_budget_all_is_well_and_beyond_it_not() -> None:
    mine = budget()
    assert [mine.look(count, 0.0) for count in (0, 10, 11, 10)] == [
        Standing.WITHIN,
        Standing.WITHIN,
        Standing.OVER,
        Standing.WITHIN,
    ]


def test_over_it_for_long_the_worker_is_lost_and_stays_so() -> None:
    mine = budget()
    assert mine.look(11, 100.0) is Standing.OVER
    assert mine.look(50, 159.9) is Standing.OVER
    assert mine.look(11, 160.0) is Standing.LOST
    assert mine.look(0, 161.0) is Standing.LOST


def test_a_moment_within_it_begins_the_time_anew() -> None:
    mine = budget()
    mine.look(11, 0.0)
    mine.look(3, 59.0)
    assert mine.look(11, 60.0) is Standing.OVER
    assert mine.look(11, 119.9) is Standing.OVER
    assert mine.look(11, 120.0) is Standing.LOST


def test_with_a_share_of_all_nothing_is_too_much() -> None:
    mine = QuarantineBudget(8, QuarantineLimits(1.0, 1.0))
    assert [mine.look(8, now) for now in (0.0, 10.0)] == [Standing.WITHIN, Standing.WITHIN]


def test_the_reason_names_all_figures() -> None:
    assert budget().explain(12).startswith("12 of 100 KV blocks are in quarantine, at most 10 may be")


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.0, 90.0)), max_size=40))
def test_whatever_happens_lost_means_over_for_the_whole_time(looks: list[tuple[int, float]]) -> None:
    mine, now, over_since, is_lost = budget(), 0.0, None, False
    for count, pause_s in looks:
        now += pause_s
        over_since = None if count <= 10 else over_since if over_since is not None else now
        is_lost = is_lost or (over_since is not None and now - over_since >= 60.0)
        expected = Standing.LOST if is_lost else Standing.OVER if over_since is not None else Standing.WITHIN
        assert mine.look(count, now) is expected
