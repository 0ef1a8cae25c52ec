"""Figures follow from records as their definitions say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from baton.load.generator.metrics import Slo, distribution, max_concurrent, percentile, summarize, wilson
from baton.load.generator.records import Outcome, RequestRecord


def record(
    intended_s: float = 0.0,
    *,
    late_s: float = 0.0,
    ttft_s: float = 0.5,
    gaps_s: tuple[float, ...] = (0.1, 0.3),
    outcome: Outcome = Outcome.COMPLETED,
) -> RequestRecord:
    """A request that was sent ``late_s`` after it was due and had its first token ``ttft_s`` after it was due."""
    times = [intended_s + ttft_s]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    is_good = outcome is Outcome.COMPLETED
    return RequestRecord(
        index=0, turn=0, intended_s=intended_s, started_s=intended_s + late_s, sent_s=intended_s + late_s,
        token_times_s=times if is_good else [], ended_s=times[-1], outcome=outcome, error="" if is_good else "words",
        planned_input_len=90, planned_output_len=3, input_len=100 if is_good else None,
        output_len=len(times) if is_good else None,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_distributions_agree_with_numpy(count: int) -> None:
    rng = random.Random(count)
    values = [rng.expovariate(3.0) for _ in range(count)]
    percentiles = (0, 12.5, 50, 90, 99, 99.9, 100)
    found = distribution(values, percentiles)
    milliseconds = np.array(values) * 1e3
    assert found.count == count
    assert found.mean == pytest.approx(np.mean(milliseconds))
    assert found.median == pytest.approx(np.median(milliseconds))
    assert found.std == pytest.approx(np.std(milliseconds))
    assert found.max == np.max(milliseconds)
    for percent in percentiles:
        assert found.percentiles[percent] == pytest.approx(np.percentile(milliseconds, percent))


def test_nothing_measured_is_all_zero() -> None:
    assert distribution([], (99,)).percentiles == {99: 0.0}
    assert percentile([4.0], 99) == 4.0


def test_time_to_first_token_counts_from_when_the_request_was_due() -> None:
    one = record(10.0, late_s=0.2, ttft_s=0.5)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.ttft_from_send_s == pytest.approx(0.3)
    assert (one.lateness_s, one.client_queue_s) == (pytest.approx(0.2), pytest.approx(0.2))
    assert one.e2el_s == pytest.approx(0.9)
    assert one.tpot_s == pytest.approx(0.2)
    assert one.itls_s == pytest.approx([0.1, 0.3])


def test_one_token_has_no_time_per_output_token_and_meets_any_target_for_it() -> None:
    one = record(gaps_s=())
    assert one.tpot_s is None
    assert Slo(tpot_s=0.001).missed(one) is None


@pytest.mark.parametrize(
    ("slo", "missed"),
    [
        (Slo(), None),
        (Slo(ttft_s=0.5, tpot_s=0.2001, e2el_s=0.91), None),
        (Slo(ttft_s=0.49), "ttft"),
        (Slo(tpot_s=0.19), "tpot"),
        (Slo(e2el_s=0.89), "e2el"),
        (Slo(ttft_s=0.49, tpot_s=0.19), "ttft"),
    ],
)
def test_a_request_is_good_when_it_meets_every_target(slo: Slo, missed: str | None) -> None:
    assert slo.missed(record()) == missed


def test_refusals_errors_and_timeouts_are_misses_and_are_in_no_latency() -> None:
    bad = [record(1.0, outcome=outcome) for outcome in Outcome if outcome is not Outcome.COMPLETED]
    summary = summarize([record(), *bad], duration_s=4.0, slo=Slo(ttft_s=1.0), percentiles=(99,))
    assert (summary.num_due, summary.completed, summary.failed, summary.num_good) == (5, 1, 4, 1)
    assert summary.missed_by == {"refused": 1, "error": 1, "timeout": 1, "not_sent": 1}
    assert summary.attainment[0] == pytest.approx(0.2)
    assert summary.errors == {"words": 4}
    assert summary.latencies["ttft"].count == 1
    assert (summary.total_input, summary.total_output) == (100, 3)
    assert summary.per_s(summary.num_good) == pytest.approx(0.25)
    assert summary.offered_rate == pytest.approx(5.0)


def test_a_server_that_refuses_most_does_not_look_good() -> None:
    records = [record(), *(record(outcome=Outcome.REFUSED) for _ in range(9))]
    assert summarize(records, duration_s=1.0, slo=Slo(ttft_s=1.0), percentiles=()).attainment[0] == pytest.approx(0.1)


def test_gaps_of_all_requests_are_one_distribution_and_the_longest_of_each_another() -> None:
    summary = summarize([record(), record(gaps_s=(0.7,))], duration_s=1.0, slo=Slo(), percentiles=(50,))
    assert summary.latencies["itl"].count == 3
    assert summary.latencies["max_itl"].median == pytest.approx(500)


@pytest.mark.parametrize(
    ("good", "count", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (90, 100, 0.8256, 0.9448), (0, 0, 0.0, 1.0)],
)
def test_wilsons_interval_has_its_published_values(good: int, count: int, low: float, high: float) -> None:
    assert wilson(good, count)[1:] == pytest.approx((low, high), abs=1e-4)


def test_intervals_that_touch_are_not_at_once() -> None:
    assert max_concurrent([(0, 1), (1, 2), (0.5, 1.5)]) == 2
    assert max_concurrent([]) == 0


def test_peak_tokens_are_those_of_the_busiest_second() -> None:
    one = record(ttft_s=0.1, gaps_s=(0.1,))
    one.output_len = 6  # three tokens an event
    summary = summarize([one, record(2.0, gaps_s=())], duration_s=3.0, slo=Slo(), percentiles=())
    assert summary.max_output_tokens_per_s == pytest.approx(6.0)


def test_a_single_moment_has_no_rate() -> None:
    assert math.isinf(summarize([record(0.0)], duration_s=1.0, slo=Slo(), percentiles=()).offered_rate)
