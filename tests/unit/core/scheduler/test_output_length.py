"""What is learned from the lengths of answers."""

from __future__ import annotations

import pytest

from baton.services.core.scheduler.output_length import OutputLengthEstimator


def test_before_the_first_answer_the_prior_counts_and_the_limit_caps_it() -> None:
    lengths = OutputLengthEstimator(prior_tokens=256)
    assert lengths.expected(10_000) == 256
    assert lengths.expected(100) == 100


def test_the_quantile_of_the_answers_is_found_within_a_bucket() -> None:
    lengths = OutputLengthEstimator(quantile=0.8, prior_weight=0.01, memory=1e6)
    for length in range(1, 1001):
        lengths.observe(length)
    assert 800 <= lengths.expected(10_000) <= 800 * 1.5


def test_new_answers_outweigh_old_ones() -> None:
    lengths = OutputLengthEstimator(memory=50)
    for _ in range(500):
        lengths.observe(1000)
    for _ in range(200):
        lengths.observe(10)
    assert lengths.expected(10_000) <= 16


def test_an_answer_that_is_already_long_is_compared_with_long_ones() -> None:
    lengths = OutputLengthEstimator(prior_weight=0.01)
    for _ in range(90):
        lengths.observe(8)
    for _ in range(10):
        lengths.observe(500)
    assert lengths.expected(10_000) == 8
    assert lengths.expected(10_000, 20) >= 500


def test_longer_than_all_that_were_seen_means_as_much_again() -> None:
    lengths = OutputLengthEstimator(prior_tokens=8)
    assert lengths.expected(10_000, 700) == 1400
    assert lengths.expected(1000, 700) == 1000
    assert lengths.expected(2**40, 2**30) == 2**31


def test_weights_stay_finite_over_many_answers() -> None:
    lengths = OutputLengthEstimator(memory=1)
    for _ in range(5000):
        lengths.observe(30)
    assert lengths.expected(1000) == 32


def test_an_expected_length_is_more_than_what_is_there() -> None:
    lengths = OutputLengthEstimator(prior_tokens=16)
    assert lengths.expected(100, 16) > 16
    assert lengths.expected(100, 15) == 16


@pytest.mark.parametrize("wrong", [{"quantile": 1.0}, {"prior_tokens": 0}, {"memory": 0.0}, {"prior_weight": 0.0}])
def test_parameters_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        OutputLengthEstimator(**wrong)  # type: ignore[arg-type]
