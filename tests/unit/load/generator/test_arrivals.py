"""Arrivals have the distribution that was asked for. Seeds are fixed; bounds are several standard errors wide."""

from __future__ import annotations

import math
import random
import statistics
from itertools import pairwise

import numpy as np
import pytest

from baton.load.generator.arrivals import Arrival, arrival_times

N = 20_000


def gaps(arrival: Arrival, *, rate: float = 10.0, burstiness: float = 1.0) -> list[float]:
    times = arrival_times(arrival, N, rate=rate, burstiness=burstiness, rng=random.Random(7))
    assert times == sorted(times)
    return [times[0], *(later - earlier for earlier, later in pairwise(times))]


def test_poisson_gaps_are_exponential_with_the_mean_of_the_rate() -> None:
    found = np.sort(gaps(Arrival.POISSON))
    # Kolmogorov-Smirnov against the exponential distribution; its 0.1% point is 1.95 / sqrt(n).
    expected = 1 - np.exp(-10.0 * found)
    steps = np.arange(N + 1) / N
    distance = max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))
    assert distance < 1.95 / math.sqrt(N)


def test_poisson_counts_in_equal_intervals_vary_as_much_as_their_mean() -> None:
    times = arrival_times(Arrival.POISSON, N, rate=10.0, burstiness=1.0, rng=random.Random(7))
    counts = np.bincount(np.array(times, dtype=int))[:-1]
    assert counts.mean() == pytest.approx(10.0, rel=0.05)
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    found = gaps(Arrival.GAMMA, burstiness=burstiness)
    assert statistics.fmean(found) == pytest.approx(0.1, rel=0.06)
    variation = statistics.pstdev(found) / statistics.fmean(found)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.06)


def test_constant_gaps_are_equal_from_the_start_on() -> None:
    times = arrival_times(Arrival.CONSTANT, 5, rate=4.0, burstiness=1.0, rng=random.Random(0))
    assert times == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_all_at_once_is_all_at_zero() -> None:
    assert arrival_times(Arrival.ALL_AT_ONCE, 3, rate=4.0, burstiness=1.0, rng=random.Random(0)) == [0.0, 0.0, 0.0]


def test_a_seed_gives_the_same_moments_again_and_another_one_does_not() -> None:
    def draw(seed: int) -> list[float]:
        return arrival_times(Arrival.POISSON, 10, rate=1.0, burstiness=1.0, rng=random.Random(seed))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_a_trace_has_its_own_times() -> None:
    with pytest.raises(ValueError, match="of its own"):
        arrival_times(Arrival.TRACE, 1, rate=1.0, burstiness=1.0, rng=random.Random(0))
