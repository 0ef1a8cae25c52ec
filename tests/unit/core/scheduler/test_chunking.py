"""How a step's tokens are shared among prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.services.core.scheduler.chunking import share_tokens


@pytest.mark.parametrize(
    ("remaining", "shares"),
    [
        ([500], [100]),
        ([30, 500, 20], [30, 50, 20]),  # the short one behind the long one has its 20
        ([500, 20], [80, 20]),
        ([500, 20, 20], [75, 20, 5]),  # no more than a quarter is kept back
        ([500, 400], [100, 0]),
        ([90, 400], [90, 10]),
        ([10, 10, 10], [10, 10, 10]),
        ([20, 20, 20, 20, 20, 500, 20], [20, 20, 20, 20, 20, 0, 0]),
        ([], []),
    ],
)
def test_long_prompts_leave_short_ones_a_quarter(remaining: list[int], shares: list[int]) -> None:
    assert share_tokens(remaining, 100, 0.25) == shares


def test_with_no_share_for_the_short_order_is_all() -> None:
    assert share_tokens([500, 1], 100, 0.0) == [100, 0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    remaining=st.lists(st.integers(1, 120), max_size=8),
    budget=st.integers(0, 200),
    short_share=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
)
def test_no_token_is_left_over_and_none_given_twice(remaining: list[int], budget: int, short_share: float) -> None:
    shares = share_tokens(remaining, budget, short_share)
    assert all(0 <= share <= tokens for share, tokens in zip(shares, remaining, strict=True))
    assert sum(shares) == min(budget, sum(remaining))
