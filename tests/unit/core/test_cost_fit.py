"""Fits find what the figures were made from, and say how far they err."""

from __future__ import annotations

import pytest

from baton.services.core.cost_fit import (
    fit_link,
    fit_steps,
    held_out_link_error,
    held_out_prefill_error,
    held_out_step_error,
    prefill_curve,
)

STEPS = [
    (batch, float(batch * context), 0.010 + 0.0004 * batch + 1e-6 * batch * context)
    for batch in (1, 2, 4, 8, 16)
    for context in (64, 512)
]


def test_a_curve_is_the_median_of_each_length_and_grows() -> None:
    samples = [(16, 0.02), (16, 0.01), (16, 9.0), (64, 0.05), (256, 0.04)]
    assert prefill_curve(samples) == ((16, 0.02), (64, 0.05), (256, 0.05))


def test_a_line_has_no_held_out_error_and_a_kink_has_one() -> None:
    assert held_out_prefill_error([(tokens, 0.01 + tokens * 1e-4) for tokens in (10, 20, 40, 80)]) == pytest.approx(0.0)
    assert held_out_prefill_error([(10, 0.01), (20, 0.08), (40, 0.09)]) == pytest.approx(0.54, abs=0.01)
    assert held_out_prefill_error([(10, 0.01), (20, 0.02)]) is None


def test_steps_are_found_again() -> None:
    fit = fit_steps(STEPS)
    assert (fit.base_s, fit.per_sequence_s, fit.per_context_token_s) == pytest.approx((0.010, 0.0004, 1e-6))
    assert held_out_step_error(STEPS) == pytest.approx(0.0, abs=1e-6)
    assert held_out_step_error(STEPS[:4]) is None


def test_noise_makes_no_negative_part() -> None:
    falling = [(batch, 64.0 * batch, 0.02 - 0.001 * batch) for batch in (1, 2, 4, 8)]
    fit = fit_steps(falling)
    assert min(fit.base_s, fit.per_sequence_s, fit.per_context_token_s) >= 0.0
    assert fit.step_s(4, 256) == pytest.approx(0.016, rel=0.3)


def test_a_link_is_found_again() -> None:
    samples = [(num_bytes, 0.002 + num_bytes / 1e9) for num_bytes in (10_000, 1_000_000, 50_000_000)]
    link = fit_link(samples)
    assert (link.fixed_s, link.bytes_per_s) == pytest.approx((0.002, 1e9), rel=1e-6)
    assert held_out_link_error(samples) == pytest.approx(0.0, abs=1e-6)
    assert held_out_link_error(samples[:2]) is None
    assert fit_link([(1000, 0.5)]).transfer_s(1000) == pytest.approx(0.5)
