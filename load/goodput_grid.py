"""Goodput over a grid of targets, from what requests took at each of several rates. Pure.

Goodput of a policy under a pair of targets is the highest rate at which nine of ten requests meet both. Between two measured
rates the share of good requests is taken to be a straight line; at the lowest one it has to be reached, and beyond the
highest one nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

ATTAINMENT = 0.9


class Pair(NamedTuple):
    """Targets in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Took:
    """One request. None: it never got there, and is a miss, whatever the targets; a TPOT of one token is 0."""

    ttft_s: float | None
    tpot_s: float | None

    def meets(self, pair: Pair) -> bool:
        if self.ttft_s is None or self.tpot_s is None:
            return False
        return self.ttft_s <= pair.ttft_s and self.tpot_s <= pair.tpot_s


def attainment(requests: Sequence[Took], pair: Pair) -> float:
    """Share of the requests that meet both targets."""
    return sum(request.meets(pair) for request in requests) / len(requests) if requests else 0.0


def goodput(shares: Mapping[float, float], least: float = ATTAINMENT) -> float:
    """Requests a second, from the share of good ones at each rate; 0.0 where the lowest rate is too high.

    A share that rises again behind a rate at which it was too low is luck: the first crossing counts.
    """
    rates = sorted(shares)
    if not rates or shares[rates[0]] < least:
        return 0.0
    for below, above in pairwise(rates):
        if shares[above] < least:
            return below + (above - below) * (shares[below] - least) / (shares[below] - shares[above])
    return rates[-1]


@dataclass(frozen=True, slots=True)
class Point:
    """One pair of targets, and every policy's goodput under it."""

    pair: Pair
    goodputs: Mapping[str, float]

    def best(self, policies: Sequence[str]) -> tuple[str, float]:
        """The policy among these with the most, and how much; the first of equals."""
        present = [policy for policy in policies if policy in self.goodputs]
        if not present:
            return "", 0.0
        policy = max(present, key=lambda name: self.goodputs[name])
        return policy, self.goodputs[policy]

    def ratio(self, policy: str, policies: Sequence[str]) -> float | None:
        """Of a policy to the best of others. None: none of those serves anything under these targets."""
        best = self.best(policies)[1]
        return self.goodputs.get(policy, 0.0) / best if best > 0.0 else None
