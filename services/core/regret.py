"""Did handing over pay? Every decision keeps the price of the other way, and is compared with it afterwards. Pure.

The other way's price is a prediction, so it is corrected by how predictions of its kind have turned out for prompts of that
length: else whoever promises most would look best.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.services.core.candidates import Mode, RoutingDecision

BUCKETS = (128, 512, 2048, 8192, 32768)
"""Prompt lengths, in tokens, up to which a bucket goes; the last one has no end."""

_NEWEST_WEIGHT = 0.05
_MOST_WRONG = 4.0  # predictions are corrected by at most this factor


@dataclass(frozen=True, slots=True)
class Comparison:
    """One decision afterwards, in seconds. ``gain_s``: what it was better by than the other way; negative: worse."""

    bucket: str
    mode: Mode
    predicted_s: float
    actual_s: float
    other_s: float | None = None

    @property
    def gain_s(self) -> float | None:
        return None if self.other_s is None else self.other_s - self.actual_s

    @property
    def regret_s(self) -> float | None:
        return None if self.gain_s is None else max(0.0, -self.gain_s)


@dataclass(slots=True)
class _Tally:
    """Of one bucket and mode."""

    num_requests: int = 0
    num_compared: int = 0
    num_paid: int = 0
    predicted_s: float = 0.0
    actual_s: float = 0.0
    gain_s: float = 0.0
    regret_s: float = 0.0


@dataclass(slots=True)
class RegretBook:
    """Sums by prompt length and mode."""

    _tallies: dict[tuple[str, Mode], _Tally] = field(default_factory=dict)
    _truths: dict[tuple[str, Mode], float] = field(default_factory=dict)  # actual / predicted, lately

    def on_first_token(self, num_tokens: int, decision: RoutingDecision, ttft_s: float) -> Comparison:
        """``ttft_s``: from the decision to the first token."""
        bucket, chosen = bucket_of(num_tokens), decision.chosen
        # What a way costs beside its own first token is only ever predicted; it counts on both sides.
        actual_s = ttft_s + chosen.interference_s
        other = decision.other_way
        other_s: float | None = None
        if other is not None:
            other_s = other.ttft_s * self._truths.get((bucket, other.mode), 1.0) + other.interference_s
        comparison = Comparison(bucket, chosen.mode, chosen.ttft_s, actual_s, other_s)
        self._note(comparison, ttft_s)
        return comparison

    def table(self) -> list[dict[str, object]]:
        """A row for each bucket and mode, shortest prompts first."""
        order = [bucket_of(limit) for limit in BUCKETS] + [bucket_of(BUCKETS[-1] + 1)]
        keys = sorted(self._tallies, key=lambda key: (order.index(key[0]), key[1].value))
        return [_row(bucket, mode, self._tallies[bucket, mode]) for bucket, mode in keys]

    def _note(self, comparison: Comparison, ttft_s: float) -> None:
        key = (comparison.bucket, comparison.mode)
        tally = self._tallies.setdefault(key, _Tally())
        tally.num_requests += 1
        tally.predicted_s += comparison.predicted_s
        tally.actual_s += ttft_s
        if comparison.gain_s is not None and comparison.regret_s is not None:
            tally.num_compared += 1
            tally.num_paid += comparison.gain_s >= 0
            tally.gain_s += comparison.gain_s
            tally.regret_s += comparison.regret_s
        if comparison.predicted_s > 0:
            seen = min(max(ttft_s / comparison.predicted_s, 1 / _MOST_WRONG), _MOST_WRONG)
            before = self._truths.get(key)
            self._truths[key] = seen if before is None else before + _NEWEST_WEIGHT * (seen - before)


def bucket_of(num_tokens: int) -> str:
    for limit in BUCKETS:
        if num_tokens <= limit:
            return f"<={limit}"
    return f">{BUCKETS[-1]}"


def _row(bucket: str, mode: Mode, tally: _Tally) -> dict[str, object]:
    num, compared = tally.num_requests, tally.num_compared
    return {
        "prompt_tokens": bucket,
        "mode": mode.value,
        "requests": num,
        "predicted_ttft_ms": round(tally.predicted_s / num * 1e3, 3),
        "ttft_ms": round(tally.actual_s / num * 1e3, 3),
        "compared": compared,
        "paid": compared and round(tally.num_paid / compared, 3),
        "gain_ms": compared and round(tally.gain_s / compared * 1e3, 3),
        "regret_ms": compared and round(tally.regret_s / compared * 1e3, 3),
    }
