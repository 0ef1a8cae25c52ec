"""Instants and the exclusive phases made from them."""

from __future__ import annotations

import pytest

from baton.services.core.lifecycle import Instant, Phase, Trace


def trace(**marks: float) -> Trace:
    made = Trace()
    for name, at in marks.items():
        made.mark(Instant(name), at)
    return made


def test_phases_are_exclusive_and_sum_to_ttft() -> None:
    made = trace(
        received=1.0, admitted=1.1, tokenized=1.3, routed=1.31, prefill_start=1.6, prefill_end=2.0, first_token=2.1
    )
    phases = made.phases_ms()
    assert phases[Phase.QUEUE] == pytest.approx(300)
    assert phases[Phase.PREFILL] == pytest.approx(400)
    assert phases[Phase.TRANSFER] == phases[Phase.DECODE_WAIT] == 0
    assert phases[Phase.FIRST_TOKEN] == pytest.approx(100)
    assert sum(phases.values()) == pytest.approx(made.ttft_ms)


def test_a_transfer_behind_the_first_token_is_no_part_of_ttft() -> None:
    made = trace(received=0.0, prefill_start=0.1, prefill_end=0.2, transfer_end=0.9, first_token=0.25)
    assert made.phases_ms()[Phase.TRANSFER] == 0
    assert sum(made.phases_ms().values()) == pytest.approx(250)


def test_instants_reported_out_of_order_are_held_inside_the_gateways_own_interval() -> None:
    made = trace(received=1.0, admitted=1.2, tokenized=1.3, prefill_start=1.25, prefill_end=5.0, first_token=2.0)
    phases = made.phases_ms()
    assert all(length >= 0 for length in phases.values())
    assert sum(phases.values()) == pytest.approx(1000)


def test_the_first_mark_of_an_instant_counts() -> None:
    made = trace(received=1.0)
    made.mark(Instant.RECEIVED, 7.0)
    assert made.at(Instant.RECEIVED) == 1.0


def test_before_the_first_token_there_is_no_ttft() -> None:
    made = trace(received=1.0, ended=2.0)
    assert made.ttft_ms is None
    assert made.e2e_ms == pytest.approx(1000)
    assert set(made.phases_ms().values()) == {0.0}
