"""When requests are sent: offsets from the start of a run, in seconds, for an open loop.

An open loop sends by the clock, whatever the server does: users do not wait for each other's answers. Pure: randomness is
an argument.
"""

from __future__ import annotations

import random
from enum import StrEnum


class Arrival(StrEnum):
    """How the gaps between requests are drawn."""

    POISSON = "poisson"  # exponential gaps: many independent users
    GAMMA = "gamma"  # gaps with a chosen burstiness
    CONSTANT = "constant"  # equal gaps
    ALL_AT_ONCE = "all-at-once"  # everything at 0
    TRACE = "trace"  # the offsets of a trace


def arrival_times(
    arrival: Arrival, num_requests: int, *, rate: float, burstiness: float, rng: random.Random
) -> list[float]:
    """Ascending offsets of ``num_requests`` requests at a mean of ``rate`` a second.

    ``burstiness`` is the gamma distribution's shape, as in vLLM's tool: the gaps' coefficient of variation is
    1/sqrt(burstiness), so below 1 requests come in bursts, 1 is Poisson, above 1 they come more evenly.
    """
    if arrival is Arrival.TRACE:
        raise ValueError("a trace has times of its own")
    if arrival is Arrival.ALL_AT_ONCE:
        return [0.0] * num_requests
    if arrival is Arrival.CONSTANT:
        return [index / rate for index in range(num_requests)]
    shape = 1.0 if arrival is Arrival.POISSON else burstiness
    times, now_s = [], 0.0
    for _ in range(num_requests):
        now_s += rng.gammavariate(shape, 1.0 / (rate * shape))
        times.append(now_s)
    return times
