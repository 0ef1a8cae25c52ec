"""``baton status``: what a running gateway and its workers are doing, once or again and again."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.services.local.gateway_client import GatewayClient
from baton.services.local.gateway_command import Refused, checked, refusal, with_gateway

_BLOCK_STATES = ("free", "cached", "request", "transfer", "quarantine")
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Sample:
    """What the gateway says at one moment."""

    at_s: float  # of a steady clock
    is_ready: bool
    reason: str  # why it is not, or what is missing
    workers: Sequence[dict[str, Any]]
    metrics: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of a metric that have these labels."""
        wanted = labels.items()
        return sum(value for (key, pairs), value in self.metrics.items() if key == name and wanted <= set(pairs))

    def by(self, name: str, label: str) -> dict[str, float]:
        """A metric summed by one of its labels."""
        sums: dict[str, float] = {}
        for (key, pairs), value in self.metrics.items():
            if key == name:
                found = dict(pairs).get(label, "")
                sums[found] = sums.get(found, 0.0) + value
        return sums


def show_status(url: str, api_key: str | None, *, watch_s: float | None = None, as_json: bool = False) -> int:
    """Prints the state and returns 0; 1 with words when the gateway does not answer. With ``watch_s`` until Ctrl-C."""

    def show(client: GatewayClient) -> None:
        sample = take(client)
        if watch_s is not None:
            _watch(client, sample, watch_s)
        elif as_json:
            print(json.dumps(to_json(sample), indent=2))
        else:
            Console().print(render(sample, None))

    return with_gateway("status", url, api_key, show)


def take(client: GatewayClient) -> Sample:
    """Raises GatewayUnreachable and Refused."""
    workers = checked(client.get("/v1/workers"))["data"]
    ready = client.get("/ready")
    reason = (ready.body or {}).get("reason", "") if ready.status == 200 else refusal(ready.body)
    metrics = client.get("/metrics")
    if metrics.status != 200:
        raise Refused(f"answered {metrics.status} to /metrics")
    return Sample(time.monotonic(), ready.status == 200, reason, workers, parse_metrics(metrics.text))


def parse_metrics(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Prometheus' text format: (name, labels) to value."""
    found = {}
    for line in page.splitlines():
        if not line.startswith("#") and (match := _SAMPLE.fullmatch(line)):
            found[match[1], tuple(_LABEL.findall(match[2] or ""))] = float(match[3])
    return found


def to_json(sample: Sample) -> dict[str, Any]:
    """For programs."""
    return {
        "ready": sample.is_ready,
        "reason": sample.reason or None,
        "queued": sample.total("baton_queued_requests"),
        "in_flight": sample.total("baton_gateway_requests_in_flight"),
        "requests": sample.by("baton_requests_total", "outcome"),
        "tokens": sample.by("baton_tokens_total", "kind"),
        "slo_met": sample.by("baton_slo_met_total", "class"),
        "slo_missed": sample.by("baton_slo_missed_total", "class"),
        "slo_missed_by": sample.by("baton_slo_missed_total", "reason"),
        "workers": list(sample.workers),
    }


def render(sample: Sample, before: Sample | None) -> RenderableType:
    """Everything; with rates where there is an earlier sample."""
    parts: list[RenderableType] = [Text("\n".join(_head(sample, before))), Text(), workers_table(sample.workers)]
    links = [(worker["id"], link) for worker in sample.workers for link in worker.get("links") or ()]
    if links:
        parts += [Text(), links_table(links)]
    classes = sorted(sample.by("baton_slo_met_total", "class") | sample.by("baton_slo_missed_total", "class"))
    if classes:
        parts += [Text(), slo_table(sample, classes)]
    return Group(*parts)


def workers_table(workers: Sequence[dict[str, Any]]) -> Table:
    """One row per worker, of its KV blocks those states that there are: it fits a terminal of 80 columns.

    Addresses and process ids are in the JSON.
    """
    table = _table("worker", "role", "state", "queued:", "running:", "KV blocks", "overdue:")
    for worker in workers:
        blocks = worker["kv_blocks"]
        states = ", ".join(f"{blocks[state]:,} {state}" for state in _BLOCK_STATES if blocks[state])
        names = (str(worker[key]) for key in ("id", "role", "state"))
        table.add_row(*names, f"{worker['queued']:,}", f"{worker['running']:,}", states, f"{worker['overdue']:,}")
    return table


def links_table(links: Iterable[tuple[str, Mapping[str, Any]]]) -> Table:
    """One row per pair of workers that hand blocks over."""
    table = _table("prefill", "decode", "link", "by", "rtt, ms:", "GB/s:", "done:", "failed:", "why")
    for prefill, link in links:
        is_closed = link["breaker"] == "closed"
        state = str(link["state"]) + ("" if is_closed else f", breaker {link['breaker']}")
        figures = (link["rtt_ms"], link["gb_per_s"], link["transfers"], link["failures"])
        shown = ("" if figure is None else f"{figure:g}" for figure in figures)
        table.add_row(prefill, link["decode"], state, link["transport"] or "", *shown, link["reason"] or "")
    return table


def slo_table(sample: Sample, classes: Sequence[str]) -> Table:
    """Requests within and outside their service level, since the gateway started."""
    reasons = sorted(sample.by("baton_slo_missed_total", "reason"))
    table = _table("class", "SLO met:", "missed:", *(f"by {reason}:" for reason in reasons), "met, %:")
    for name in classes:
        met = sample.total("baton_slo_met_total", **{"class": name})
        missed = sample.total("baton_slo_missed_total", **{"class": name})
        by = [sample.total("baton_slo_missed_total", **{"class": name, "reason": reason}) for reason in reasons]
        share = f"{100 * met / (met + missed):.1f}" if met + missed else "-"
        table.add_row(name, f"{met:,.0f}", f"{missed:,.0f}", *(f"{count:,.0f}" for count in by), share)
    return table


def _table(*headings: str) -> Table:
    """Without lines, for narrow terminals. A heading with a colon is that of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading.removesuffix(":"), justify="right" if heading.endswith(":") else "left")
    return table


def _head(sample: Sample, before: Sample | None) -> list[str]:
    state = "ready" if sample.is_ready else "not ready"
    lines = [f"gateway: {state}{f' ({sample.reason})' if sample.reason else ''}"]
    outcomes = sample.by("baton_requests_total", "outcome")
    ended = ", ".join(f"{name} {count:,.0f}" for name, count in sorted(outcomes.items())) or "none"
    in_flight, queued = sample.total("baton_gateway_requests_in_flight"), sample.total("baton_queued_requests")
    lines.append(f"requests: {in_flight:,.0f} in flight, {queued:,.0f} queued; ended: {ended}")
    tokens = sample.by("baton_tokens_total", "kind")
    cached, prompt = tokens.get("cached", 0.0), tokens.get("prompt", 0.0)
    share = f" ({cached / prompt:.0%} cached)" if prompt else ""
    lines.append(f"tokens: {prompt:,.0f} prompt{share}, {tokens.get('completion', 0.0):,.0f} completion")
    if before is not None and (seconds := sample.at_s - before.at_s) > 0:

        def rate(name: str, **labels: str) -> float:
            return (sample.total(name, **labels) - before.total(name, **labels)) / seconds

        prompt_rate, completion_rate = (rate("baton_tokens_total", kind=kind) for kind in ("prompt", "completion"))
        lines.append(
            f"lately: {rate('baton_requests_total'):.1f} requests/s, {prompt_rate:,.0f} prompt and {completion_rate:,.0f} "
            f"completion tokens/s"
        )
    return lines


def _watch(client: GatewayClient, sample: Sample, watch_s: float) -> None:
    """Until Ctrl-C. Raises when the gateway is gone."""
    console = Console()
    before: Sample | None = None
    with _interruptible(), Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            if console.is_terminal:
                live.update(render(sample, before), refresh=True)
            else:
                console.print(render(sample, before))
            time.sleep(watch_s)
            before, sample = sample, take(client)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C leaves the block, so that the cursor comes back; outside it the process just ends."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, previous)
