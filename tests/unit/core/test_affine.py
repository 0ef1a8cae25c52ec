"""A straight line learned from observations."""

from __future__ import annotations

import pytest

from baton.services.core.affine import AffineFit


def fitted(points: list[tuple[float, float]], rounds: int = 20, **options: float) -> AffineFit:
    fit = AffineFit(**options)
    for _ in range(rounds):
        for x, y in points:
            fit.observe(x, y)
    return fit


def test_nothing_is_expected_before_the_first_observation() -> None:
    fit = AffineFit()
    assert (fit.is_known, fit.at(5.0), fit.slope) == (False, 0.0, 0.0)


def test_base_and_slope_are_found() -> None:
    fit = fitted([(float(x), 3.0 + 0.5 * x) for x in range(0, 40, 4)])
    assert fit.slope == pytest.approx(0.5, rel=0.05)
    assert (fit.at(0.0), fit.at(100.0)) == pytest.approx((3.0, 53.0), rel=0.05)


def test_observations_at_one_place_are_taken_for_a_line_through_the_origin() -> None:
    fit = fitted([(10.0, 2.0)])
    assert fit.at(10.0) == pytest.approx(2.0)
    assert fit.at(20.0) == pytest.approx(4.0)


def test_neither_part_is_negative() -> None:
    falling = fitted([(0.0, 10.0), (10.0, 1.0)])
    assert falling.slope == 0.0
    below = fitted([(10.0, 0.0), (20.0, 10.0)])
    assert below.at(0.0) >= 0.0


def test_what_was_is_forgotten() -> None:
    fit = fitted([(5.0, 1.0), (10.0, 2.0)], memory=20.0)
    for _ in range(100):
        fit.observe(5.0, 2.0)
        fit.observe(10.0, 4.0)
    assert fit.at(10.0) == pytest.approx(4.0, rel=0.05)


def test_one_stall_of_a_minute_changes_little() -> None:
    fit = fitted([(5.0, 1.0), (10.0, 2.0)])
    fit.observe(10.0, 60.0)
    assert fit.at(10.0) < 2.4
