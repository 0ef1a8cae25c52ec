"""What the load generator itself costs: a figure of a server is worth no more than the clock that took it."""

from __future__ import annotations

from baton.load.generator.results import MAX_LATENESS_S
from baton.load.generator.self_check import self_check
from baton.load.report import Row

# Requests/s at which lateness is looked at.
_RATE = 1_000
_LATENESS_LIMIT_MS = 2.0


def bench_generator() -> list[Row]:
    """Lateness at a fixed rate, and the highest rate of a ladder that is driven on time."""
    checks = self_check()
    rows = [
        Row(
            f"lateness of a request, p99, at {check.rate:,}/s of 8 tokens",
            check.lateness_p99_ms,
            "ms",
            limit_name="at most",
            limit=_LATENESS_LIMIT_MS,
        )
        for check in checks
        if check.rate == _RATE
    ]
    driven = [check.rate for check in checks if check.is_on_time]
    name = f"requests/s of 8 tokens each, late by at most {MAX_LATENESS_S * 1e3:.0f} ms at p99"
    if not driven:
        return [*rows, Row(name, None, "1/s", skipped=f"late even at {checks[0].rate} a second")]
    return [*rows, Row(name, float(max(driven)), "1/s", limit_name="at least", limit=float(_RATE))]
