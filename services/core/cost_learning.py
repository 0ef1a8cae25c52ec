"""What workers cost, learned: from a profile at first, then from how long prompts and steps really took. Pure.

Each worker has, for prompts of each size, a mean that forgets; so has each pool. A worker's own is blended with its pool's by
how much is known of it, so a new one is priced like its neighbours and one outlier moves little. What is long past counts less
and less, so a worker that was slow once is asked again. Figures are bounded: a clock that stood still teaches nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baton.services.core.cost_model import (
    DEFAULT_DECODE_STEP_S,
    DEFAULT_PREFILL_S_PER_TOKEN,
    DecodeCost,
    WorkerCost,
    interpolate,
)

HALF_LIFE_S = 600.0
_MOST_WEIGHT = 16.0  # of what is behind: the newest of many counts a sixteenth
_MAX_SURPRISE = 4.0  # an observation counts as this many times what was expected, or this part of it, at most
_POOL_WEIGHT = 2.0  # of the pool's mean beside a worker's own observations
# Until so many prompts are known of a worker, up to this part of a prompt's time is given for learning more.
_ENOUGH, _CURIOSITY = 4.0, 0.2
_LEAST_S = 1e-7
# What lies between two tokens around a handoff changes with the load: it counts for a minute, and after some it is not known
# any more, so that handing over is tried again where it was too slow once.
_GAP_HALF_LIFE_S, _LEAST_GAPS = 60.0, 0.25


@dataclass(frozen=True, slots=True)
class Profile:
    """What ``baton profile`` measured: of a prompt's length and of a step's batch."""

    prefill: tuple[tuple[int, float], ...] = ()  # tokens, seconds; growing
    decode: DecodeCost | None = None


@dataclass(slots=True)
class _Mean:
    """Of x and y together, with a weight that decays."""

    x: float = 0.0
    y: float = 0.0
    weight: float = 0.0
    at_s: float = -math.inf
    half_life_s: float = HALF_LIFE_S

    def weight_at(self, now: float) -> float:
        return self.weight * 0.5 ** ((now - self.at_s) / self.half_life_s) if now > self.at_s else self.weight

    def add(self, x: float, y: float, now: float) -> None:
        before = min(self.weight_at(now), _MOST_WEIGHT - 1.0)
        self.weight, self.at_s = before + 1.0, max(now, self.at_s)
        self.x += (x - self.x) / self.weight
        self.y += (y - self.y) / self.weight


@dataclass(slots=True)
class _Known:
    """Of one worker, or of a pool."""

    prefill: dict[int, _Mean] = field(default_factory=dict)  # by the bits of the number of tokens
    decode: dict[int, _Mean] = field(default_factory=dict)  # by the bits of the batch
    gap: _Mean | None = None  # around handoffs, and how far it is from that mostly


class CostBook:
    """``pool``: any name that workers of one kind share."""

    def __init__(self, profiles: Mapping[str, Profile] | None = None) -> None:
        self._profiles = dict(profiles or {})
        self._workers: dict[str, _Known] = {}
        self._pools: dict[str, _Known] = {}

    def on_prefill(self, incarnation: str, pool: str, num_tokens: int, prefill_s: float, now: float) -> None:
        """A prompt of which so many tokens were computed took so long from its first step to its first token."""
        if num_tokens < 1 or prefill_s <= 0:
            return
        expected_s = self._prefill_s(incarnation, pool, num_tokens, now)
        for known in (self._of(incarnation), self._pool(pool)):
            mean = known.prefill.setdefault(num_tokens.bit_length(), _Mean())
            mean.add(num_tokens, _bounded(prefill_s, expected_s), now)

    def on_decode(self, incarnation: str, pool: str, batch: int, step_s: float, now: float) -> None:
        """A stream's tokens came so far apart, among so many streams."""
        if batch < 1 or step_s <= 0:
            return
        known = self._decode(incarnation, pool, now)
        for one in (self._of(incarnation), self._pool(pool)):
            mean = one.decode.setdefault(batch.bit_length(), _Mean())
            mean.add(batch, _bounded(step_s, known.step_s(batch) if known else None), now)

    def on_handoff(self, incarnation: str, pool: str, gap_s: float, now: float) -> None:
        """The second token of a request that was handed over to a worker came so long after the first."""
        if gap_s <= 0:
            return
        for known in (self._of(incarnation), self._pool(pool)):
            gap = known.gap
            if gap is None or gap.weight_at(now) < _LEAST_GAPS:
                gap = known.gap = _Mean(half_life_s=_GAP_HALF_LIFE_S)
            seen_s = _bounded(gap_s, gap.x if gap.weight else None)
            gap.add(seen_s, abs(seen_s - gap.x) if gap.weight else 0.0, now)

    def forget_all_but(self, alive: Sequence[str]) -> None:
        """Drops workers that are gone. What their pool learned from them stays."""
        for incarnation in self._workers.keys() - set(alive):
            del self._workers[incarnation]

    def cost(
        self, incarnation: str, pool: str, *, prefill_s_per_token: float, decode_step_s: float, now: float
    ) -> WorkerCost:
        """``prefill_s_per_token`` and ``decode_step_s`` are what the worker reports of its last steps; 0: of none yet."""
        curve = self._curve(incarnation, pool, now)
        per_token_s = prefill_s_per_token or (curve[-1][1] / curve[-1][0] if curve else DEFAULT_PREFILL_S_PER_TOKEN)
        decode = self._decode(incarnation, pool, now)
        num_known = self.num_observed(incarnation, now)
        return WorkerCost(
            prefill_s_per_token=per_token_s,
            decode_step_s=decode_step_s or (decode.step_s(1) if decode else DEFAULT_DECODE_STEP_S),
            curve=curve,
            decode=decode,
            curiosity=_CURIOSITY * max(0.0, 1.0 - num_known / _ENOUGH),
            gap_s=self._gap_s(incarnation, pool, now),
        )

    def _gap_s(self, incarnation: str, pool: str, now: float) -> float | None:
        """What most handoffs keep to: the mean and the mean distance from it."""
        own = _still_known(self._workers.get(incarnation, _NOTHING).gap, now)
        others = _still_known(self._pools.get(pool, _NOTHING).gap, now)
        return None if own is None and others is None else sum(_blend(own, others, now))

    def num_observed(self, incarnation: str, now: float) -> float:
        """Prompts of a worker that still count."""
        known = self._workers.get(incarnation)
        return 0.0 if known is None else sum(mean.weight_at(now) for mean in known.prefill.values())

    def _prefill_s(self, incarnation: str, pool: str, num_tokens: int, now: float) -> float | None:
        curve = self._curve(incarnation, pool, now)
        return interpolate(curve, num_tokens) if curve else None

    def _curve(self, incarnation: str, pool: str, now: float) -> tuple[tuple[int, float], ...]:
        """Growing in both; the profile's points where nothing was observed."""
        profile = self._profiles.get(pool, _NO_PROFILE)
        own = self._workers.get(incarnation, _NOTHING).prefill
        others = self._pools.get(pool, _NOTHING).prefill
        points: dict[int, tuple[float, float]] = {}
        for tokens, seconds in profile.prefill:
            points[tokens.bit_length()] = (tokens, seconds)
        for bits in own.keys() | others.keys():
            points[bits] = _blend(own.get(bits), others.get(bits), now)
        if not points:
            return self._curve_of_others(pool, now)
        curve: list[tuple[int, float]] = []
        for num_tokens, took_s in sorted(points.values()):
            # Longer prompts never take less: where noise says so, the longer one's figure is raised.
            curve.append((max(1, round(num_tokens)), max(took_s, curve[-1][1] if curve else _LEAST_S)))
        return tuple(curve)

    def _curve_of_others(self, pool: str, now: float) -> tuple[tuple[int, float], ...]:
        """Workers that have prefilled nothing yet, like most decode workers, are taken to be as quick as those that have."""
        for other in sorted(self._pools.keys() | self._profiles.keys()):
            has_points = other in self._pools and self._pools[other].prefill
            if other != pool and (has_points or self._profiles.get(other, _NO_PROFILE).prefill):
                return self._curve("", other, now)
        return ()

    def _decode(self, incarnation: str, pool: str, now: float) -> DecodeCost | None:
        """Base and slope through the means of all batch sizes, by least squares; neither can be negative."""
        own = self._workers.get(incarnation, _NOTHING).decode
        others = self._pools.get(pool, _NOTHING).decode
        points = [_blend(own.get(bits), others.get(bits), now) for bits in sorted(own.keys() | others.keys())]
        profile = self._profiles.get(pool, _NO_PROFILE).decode
        if profile is not None and len(points) < 2:
            if not points:
                return profile
            batch, step_s = points[0]
            scale = step_s / max(profile.step_s(round(batch)), _LEAST_S)
            return DecodeCost(profile.base_s * scale, profile.per_sequence_s * scale)
        if not points:
            return self._decode_of_others(pool, now)
        if len(points) < 2:
            return None
        return fit_decode(points)

    def _decode_of_others(self, pool: str, now: float) -> DecodeCost | None:
        """Prefill workers that have answered nothing yet are taken to step as quickly as those that decode."""
        for other in sorted(self._pools.keys() | self._profiles.keys()):
            if other != pool and (
                self._pools.get(other, _NOTHING).decode or self._profiles.get(other, _NO_PROFILE).decode
            ):
                return self._decode("", other, now)
        return None

    def _of(self, incarnation: str) -> _Known:
        return self._workers.setdefault(incarnation, _Known())

    def _pool(self, pool: str) -> _Known:
        return self._pools.setdefault(pool, _Known())


def fit_decode(points: Sequence[tuple[float, float]]) -> DecodeCost:
    """The line through (batch, seconds) that errs least in proportion; base and slope at least 0."""
    weights = [1.0 / max(seconds, _LEAST_S) ** 2 for _, seconds in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = 0.0
    if spread > 0:
        slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
    slope = min(max(slope, 0.0), mean_y / mean_x if mean_x > 0 else 0.0)
    return DecodeCost(max(0.0, mean_y - slope * mean_x), slope)


def _still_known(gap: _Mean | None, now: float) -> _Mean | None:
    return None if gap is None or gap.weight_at(now) < _LEAST_GAPS else gap


def _blend(own: _Mean | None, pool: _Mean | None, now: float) -> tuple[float, float]:
    if own is None or pool is None:
        mean = own or pool
        assert mean is not None
        return mean.x, mean.y
    weight = own.weight_at(now)
    share = weight / (weight + _POOL_WEIGHT)
    return share * own.x + (1 - share) * pool.x, share * own.y + (1 - share) * pool.y


def _bounded(seen_s: float, expected_s: float | None) -> float:
    if expected_s is None or expected_s <= 0:
        return max(seen_s, _LEAST_S)
    return min(max(seen_s, expected_s / _MAX_SURPRISE), expected_s * _MAX_SURPRISE)


_NO_PROFILE = Profile()
_NOTHING = _Known()
