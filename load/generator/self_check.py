"""How much load this generator can drive on this machine, before a figure of a server is believed.

Against a server that answers at once: lateness at a fixed rate, and the highest rate on a ladder at which it is still on time.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from baton.load.generator.arrivals import Arrival, arrival_times
from baton.load.generator.http_client import HttpClient, Target
from baton.load.generator.metrics import Slo, summarize
from baton.load.generator.prompts import PromptMaker
from baton.load.generator.results import MAX_LATENESS_S
from baton.load.generator.runner import OpenLoop
from baton.load.generator.sender import RequestMaker, Sender
from baton.load.generator.target import word_vocabulary
from baton.load.generator.workload import Lengths, made_up
from baton.services.runtime.main import loop_factory

RATES = (250, 500, 1_000, 2_000, 4_000, 8_000)
_SECONDS = 2.0
# Of what was due: below this the generator does not keep up, however late each single request is.
_MIN_ACHIEVED = 0.95


@dataclass(frozen=True, slots=True)
class RateCheck:
    """One rate of the ladder."""

    rate: int
    offered: float  # requests/s that were due: Poisson arrivals are never exactly as many as asked
    achieved: float
    lateness_p50_ms: float
    lateness_p99_ms: float
    ttft_p50_ms: float  # to a server that answers at once: the client's and the server's own cost
    cpu_share: float
    failed: int

    @property
    def is_on_time(self) -> bool:
        on_time = self.lateness_p99_ms <= MAX_LATENESS_S * 1e3
        return on_time and not self.failed and self.achieved >= _MIN_ACHIEVED * self.offered


def self_check(rates: tuple[int, ...] = RATES, seconds: float = _SECONDS) -> list[RateCheck]:
    """Climbs until it is late at two rates in a row; one alone may be somebody else's doing."""
    with null_server() as url, asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_climb(url, rates, seconds))


def print_self_check() -> int:
    """The ladder as a table; 1 where even the lowest rate is late."""
    checks = self_check()
    table = Table(title="this generator against a server that answers at once", title_justify="left")
    for heading in ("requests/s asked", "achieved", "late p50, ms", "late p99, ms", "TTFT p50, ms", "of a core"):
        table.add_column(heading, justify="right")
    for check in checks:
        mark = "" if check.is_on_time else " late"
        table.add_row(
            f"{check.rate:,}{mark}",
            f"{check.achieved:,.0f}",
            f"{check.lateness_p50_ms:.2f}",
            f"{check.lateness_p99_ms:.2f}",
            f"{check.ttft_p50_ms:.2f}",
            f"{check.cpu_share:.0%}",
        )
    Console().print(table)
    driven = [check.rate for check in checks if check.is_on_time]
    if not driven:
        sys.stderr.write(f"baton bench: not on time even at {checks[0].rate} requests/s: free a core for it\n")
        return 1
    print(f"on time (p99 within {MAX_LATENESS_S * 1e3:.0f} ms) up to {max(driven):,} requests/s of 8 tokens each")
    return 0


@contextmanager
def null_server() -> Iterator[str]:
    """``null_server`` as a process of its own; its URL."""
    command = [sys.executable, "-m", "baton.load.generator.null_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


async def _climb(url: str, rates: tuple[int, ...], seconds: float) -> list[RateCheck]:
    checks: list[RateCheck] = []
    async with _client(url) as client:
        await _check(client, rates[0], 0.2)  # connections, caches, branch predictors
        for rate in rates:
            checks.append(await _check(client, rate, seconds))
            if len(checks) > 1 and not any(check.is_on_time for check in checks[-2:]):
                break
    return checks


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[HttpClient]:
    client = HttpClient(Target.parse(url), {})
    try:
        yield client
    finally:
        client.close()


async def _check(client: HttpClient, rate: int, seconds: float) -> RateCheck:
    times = arrival_times(Arrival.POISSON, int(rate * seconds), rate=rate, burstiness=1.0, rng=random.Random(1))
    loop = OpenLoop(
        made_up(times, Lengths(16, 8), random.Random(1)),
        prompts=PromptMaker(await word_vocabulary(client, "null", "completions"), 1),
        requests=RequestMaker("null", "completions", {}, True),
        make_sender=lambda clock: Sender(client, "completions", timeout_s=60.0, clock=clock),
    )
    result = await loop.run(asyncio.Event())
    summary = summarize(result.records, duration_s=result.duration_s, slo=Slo(), percentiles=(99,))
    lateness = summary.latencies["send_lateness"]
    return RateCheck(
        rate=rate,
        offered=summary.offered_rate,
        achieved=summary.completed / result.duration_s,
        lateness_p50_ms=lateness.median,
        lateness_p99_ms=lateness.percentiles[99],
        ttft_p50_ms=summary.latencies["ttft_from_send"].median,
        cpu_share=result.cpu_s / result.duration_s,
        failed=summary.failed,
    )
