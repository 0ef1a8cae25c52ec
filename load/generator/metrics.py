"""Records to figures. Pure: no clock, no library but the standard one.

Latencies are those of completed requests. Goodput and attainment are about all requests that were due: one that was
refused, failed, timed out or could not be sent is a miss, or shedding load would look like speed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from baton.load.generator.records import Outcome, RequestRecord

# Two-sided 95%.
_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets in seconds; None: any will do."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    @property
    def is_set(self) -> bool:
        return (self.ttft_s, self.tpot_s, self.e2el_s) != (None, None, None)

    def missed(self, record: RequestRecord) -> str | None:
        """Which target was missed first ("ttft", "tpot", "e2el", or how it ended), or None: a good request.

        A figure that a request cannot have (TPOT of one token) is met.
        """
        if record.outcome is not Outcome.COMPLETED:
            return record.outcome.value
        for name, target, value in (
            ("ttft", self.ttft_s, record.ttft_s),
            ("tpot", self.tpot_s, record.tpot_s),
            ("e2el", self.e2el_s, record.e2el_s),
        ):
            if target is not None and value is not None and value > target:
                return name
        return None


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one latency, in milliseconds. All zero where nothing was measured, as in vLLM's JSON."""

    count: int
    mean: float
    median: float
    std: float
    max: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures of a run."""

    duration_s: float
    num_due: int
    outcomes: Mapping[Outcome, int]
    errors: Mapping[str, int]
    missed_by: Mapping[str, int]  # which target, or which bad end
    num_good: int
    attainment: tuple[float, float, float]  # share of good requests, and its 95% interval (Wilson)
    total_input: int
    total_output: int
    total_cached: int
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    offered_rate: float  # requests/s that were due
    latencies: Mapping[str, Distribution]  # ttft, tpot, itl, e2el, and what vLLM's tool has not

    @property
    def completed(self) -> int:
        return self.outcomes[Outcome.COMPLETED]

    @property
    def failed(self) -> int:
        return self.num_due - self.completed

    def per_s(self, amount: float) -> float:
        return amount / self.duration_s if self.duration_s > 0 else 0.0


def summarize(
    records: Sequence[RequestRecord], *, duration_s: float, slo: Slo, percentiles: Sequence[float]
) -> Summary:
    """Figures of all requests that were due. ``duration_s`` is from the start of the run to its last end."""
    good = [record for record in records if record.outcome is Outcome.COMPLETED]
    missed = Counter(reason for record in records if (reason := slo.missed(record)) is not None)
    num_good = len(records) - missed.total()
    latencies = {
        "ttft": _present(record.ttft_s for record in good),
        "tpot": _present(record.tpot_s for record in good),
        "itl": [gap for record in good for gap in record.itls_s],
        "e2el": _present(record.e2el_s for record in good),
        "ttft_from_send": _present(record.ttft_from_send_s for record in good),
        "max_itl": [max(gaps) for record in good if (gaps := record.itls_s)],
        "send_lateness": _present(record.lateness_s for record in records),
        "client_queue_time": _present(record.client_queue_s for record in records),
    }
    last_due_s = max((record.intended_s for record in records), default=0.0)
    return Summary(
        duration_s=duration_s,
        num_due=len(records),
        outcomes=Counter(record.outcome for record in records),
        errors=Counter(record.error for record in records if record.outcome is not Outcome.COMPLETED),
        missed_by=missed,
        num_good=num_good,
        attainment=wilson(num_good, len(records)),
        total_input=sum(record.input_len or record.planned_input_len for record in good),
        total_output=sum(record.output_len or 0 for record in good),
        total_cached=sum(record.cached_len or 0 for record in good),
        max_output_tokens_per_s=_peak_tokens_per_s(good),
        max_concurrent_requests=max_concurrent(
            (record.sent_s, record.ended_s)
            for record in records
            if record.sent_s is not None and record.ended_s is not None
        ),
        offered_rate=len(records) / last_due_s if last_due_s > 0 else math.inf,
        latencies={name: distribution(values, percentiles) for name, values in latencies.items()},
    )


def distribution(values_s: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    """Of values in seconds."""
    ordered = sorted(value * 1e3 for value in values_s)
    if not ordered:
        return Distribution(0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(percentiles, 0.0))
    mean = statistics.fmean(ordered)
    return Distribution(
        count=len(ordered),
        mean=mean,
        median=percentile(ordered, 50),
        std=math.sqrt(statistics.fmean((value - mean) ** 2 for value in ordered)),
        max=ordered[-1],
        percentiles={percent: percentile(ordered, percent) for percent in percentiles},
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of ascending values, as numpy does it by default."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def wilson(num_good: int, num_all: int) -> tuple[float, float, float]:
    """A share and its 95% interval (Wilson, 1927), which stays inside 0..1 and is wide where there are few requests."""
    if not num_all:
        return 0.0, 0.0, 1.0
    share = num_good / num_all
    spread = _Z * math.sqrt(share * (1 - share) / num_all + (_Z / (2 * num_all)) ** 2)
    middle, scale = share + _Z**2 / (2 * num_all), 1 + _Z**2 / num_all
    return share, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def max_concurrent(intervals: Iterable[tuple[float, float]]) -> int:
    """Most intervals that overlap; one that ends where another begins does not."""
    steps = sorted(step for begin, end in intervals for step in ((begin, 1), (end, -1)))
    most = now = 0
    for _, change in steps:
        now += change
        most = max(most, now)
    return most


def _peak_tokens_per_s(records: Iterable[RequestRecord]) -> float:
    """Of the busiest whole second. A request's tokens are spread evenly over its events."""
    per_second: Counter[int] = Counter()
    for record in records:
        times = record.token_times_s
        share = (record.output_len or len(times)) / len(times)
        for at_s in times:
            per_second[int(at_s)] += share  # type: ignore[assignment]
    return float(max(per_second.values(), default=0))


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
