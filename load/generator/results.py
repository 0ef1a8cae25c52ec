"""The figures of a run as JSON, with the key names of ``vllm bench serve``, as JSON lines, and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from baton.load.generator.metrics import Distribution, Slo, Summary
from baton.load.generator.records import Outcome, RequestRecord
from baton.load.generator.runner import RunResult

SCHEMA_VERSION = 1

# A generator that is later than this has measured itself: 5 ms, or a twentieth of what TTFT may be.
MAX_LATENESS_S = 0.005
MAX_LATENESS_SHARE = 0.05
MAX_CPU_SHARE = 0.9

_ROWS = (
    ("ttft", "TTFT"),
    ("ttft_from_send", "TTFT, sent"),
    ("tpot", "TPOT"),
    ("itl", "ITL"),
    ("max_itl", "longest ITL"),
    ("e2el", "E2EL"),
    ("send_lateness", "sent late"),
)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a run says."""

    result: RunResult
    summary: Summary
    slo: Slo
    context: Mapping[str, Any]  # model, options, machine

    def warnings(self) -> list[str]:
        """What a reader has to know before believing the figures."""
        lines = []
        result, summary = self.result, self.summary
        if result.is_interrupted:
            due = f"{summary.num_due} of {result.num_planned} requests had ended"
            lines.append(f"interrupted: {due}; {result.num_given_up} under way were given up and are not counted")
        lateness = summary.latencies["send_lateness"]
        allowed_ms = max(MAX_LATENESS_S, MAX_LATENESS_SHARE * (self.slo.ttft_s or 0.0)) * 1e3
        late_ms = lateness.percentiles.get(99.0, lateness.max)
        if late_ms > allowed_ms:
            lines.append(
                f"the generator was the limit: it sent {late_ms:.1f} ms late (p99; {allowed_ms:.0f} ms are allowed). Lower the "
                f"rate, free its core, or spread the load over several generators"
            )
        cpu_share = result.cpu_s / result.duration_s if result.duration_s else 0.0
        if cpu_share > MAX_CPU_SHARE:
            lines.append(f"the generator used {cpu_share:.0%} of a core: latencies contain its own waiting")
        tpot = summary.latencies["tpot"]
        if tpot.count and summary.total_output / max(1, summary.completed) < 16:
            lines.append("answers have fewer than 16 tokens on average: TPOT is mostly noise")
        return lines


def to_json(report: Report, *, is_detailed: bool) -> dict[str, Any]:
    """Names and units of vLLM's tool where it has the figure; the rest besides."""
    summary, result = report.summary, report.result
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **report.context,
        "is_interrupted": result.is_interrupted,
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "refused": summary.outcomes[Outcome.REFUSED],
        "timeouts": summary.outcomes[Outcome.TIMEOUT],
        "not_sent": summary.outcomes[Outcome.NOT_SENT],
        "errors_by_kind": dict(summary.errors),
        "total_input_tokens": summary.total_input,
        "total_output_tokens": summary.total_output,
        "total_cached_tokens": summary.total_cached,
        "offered_request_rate": summary.offered_rate if math.isfinite(summary.offered_rate) else "inf",
        "request_throughput": summary.per_s(summary.completed),
        "request_goodput": summary.per_s(summary.num_good) if report.slo.is_set else None,
        "output_throughput": summary.per_s(summary.total_output),
        "total_token_throughput": summary.per_s(summary.total_input + summary.total_output),
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
        "slo_attainment": summary.attainment[0],
        "slo_attainment_95": list(summary.attainment[1:]),
        "slo_missed_by": dict(summary.missed_by),
        "generator_cpu_share": result.cpu_s / result.duration_s if result.duration_s else 0.0,
        "warnings": report.warnings(),
    }
    for name, figures in summary.latencies.items():
        content |= _named(name, figures)
    if is_detailed:
        records = result.records
        content |= {
            "input_lens": [record.input_len or record.planned_input_len for record in records],
            "output_lens": [record.output_len or 0 for record in records],
            "ttfts": [record.ttft_s or 0.0 for record in records],
            "itls": [record.itls_s for record in records],
            "latencies": [record.e2el_s or 0.0 for record in records],
            "start_times": [record.sent_s for record in records],
            "queue_times": [record.client_queue_s for record in records],
            "errors": [record.error for record in records],
        }
    return content


def write_json(content: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_records(records: Iterable[RequestRecord], slo: Slo, path: Path) -> None:
    """One JSON object a line, with the figures that follow from its times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            derived = {
                "ttft_s": record.ttft_s,
                "ttft_from_send_s": record.ttft_from_send_s,
                "tpot_s": record.tpot_s,
                "e2el_s": record.e2el_s,
                "lateness_s": record.lateness_s,
                "missed": slo.missed(record),
            }
            file.write(json.dumps(asdict(record) | derived) + "\n")


def render(report: Report) -> RenderableType:
    """What a terminal shows."""
    summary = report.summary
    return Group(_totals(report), _latencies(summary, sorted(next(iter(summary.latencies.values())).percentiles)))


def _totals(report: Report) -> Table:
    summary = report.summary
    table = Table(title=str(report.context["title"]), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    offered = "all at once" if math.isinf(summary.offered_rate) else f"{summary.offered_rate:.2f} a second"
    table.add_row("requests due", f"{summary.num_due:,} ({offered})")
    table.add_row("completed", f"{summary.completed:,} in {summary.duration_s:.2f} s")
    for outcome in (Outcome.REFUSED, Outcome.ERROR, Outcome.TIMEOUT, Outcome.NOT_SENT):
        if count := summary.outcomes[outcome]:
            table.add_row(outcome.value.replace("_", " "), f"[red]{count:,}[/red]")
    table.add_row("requests/s", f"{summary.per_s(summary.completed):.2f}")
    if report.slo.is_set:
        share, low, high = summary.attainment
        table.add_row("goodput, requests/s", f"{summary.per_s(summary.num_good):.2f}")
        table.add_row("good of those due", f"{share:.1%} (95%: {low:.1%} to {high:.1%})")
        table.add_row("missed by", ", ".join(f"{k} {n:,}" for k, n in sorted(summary.missed_by.items())) or "-")
    cached = f", {summary.total_cached:,} of them cached" if summary.total_cached else ""
    table.add_row("prompt tokens", f"{summary.total_input:,}{cached}")
    table.add_row("output tokens", f"{summary.total_output:,}")
    table.add_row("output tokens/s", f"{summary.per_s(summary.total_output):,.1f}")
    table.add_row("at most at once", f"{summary.max_concurrent_requests:,}")
    return table


def _latencies(summary: Summary, percentiles: Sequence[float]) -> Table:
    table = Table(
        caption="milliseconds, of completed requests; TTFT and E2EL from when a request was due", caption_justify="left"
    )
    table.add_column("")
    for heading in ("mean", *(f"p{_number(percent)}" for percent in percentiles), "max"):
        table.add_column(heading, justify="right")
    for name, heading in _ROWS:
        figures = summary.latencies[name]
        if figures.count:
            values = (figures.mean, *(figures.percentiles[percent] for percent in percentiles), figures.max)
            table.add_row(heading, *(f"{value:,.2f}" for value in values))
    return table


def _named(name: str, figures: Distribution) -> dict[str, float]:
    named = {"mean": figures.mean, "median": figures.median, "std": figures.std, "max": figures.max}
    named |= {f"p{_number(percent)}": value for percent, value in figures.percentiles.items()}
    return {f"{figure}_{name}_ms": value for figure, value in named.items()}


def _number(percent: float) -> str:
    return str(int(percent)) if percent == int(percent) else str(percent)
