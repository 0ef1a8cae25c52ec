"""Every metric that the gateway exports, declared once.

Times come from a request's Trace, so they agree with its receipt. What workers say of themselves is read when Prometheus
asks, so a worker that is gone leaves no stale figures behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.api.common.v1 import common_pb2
from baton.services.core.lifecycle import Instant, Trace
from baton.services.core.regret import Comparison

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# The usual service levels are bucket edges, so the share of requests within them is exact.
_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0)
_E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PHASE_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TRANSFER_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

BLOCK_STATES = ("free", "cached", "request", "transfer", "quarantine")

WorkerStatuses = Callable[[], Iterable[common_pb2.WorkerStatus]]


class Metrics:
    """The gateway's metrics, in a registry of their own."""

    def __init__(
        self, worker_statuses: WorkerStatuses = tuple, *, version: str = "", num_waiting: Callable[[], int] = lambda: 0
    ) -> None:
        """``num_waiting``: requests that wait at the gateway for a worker that can take them."""
        registry = self.registry = CollectorRegistry()
        self._ttft = Histogram(
            "baton_ttft_seconds",
            "From the request's first byte to its first token.",
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "baton_tpot_seconds",
            "Mean time of an output token after the first.",
            buckets=_TPOT_BUCKETS_S,
            registry=registry,
        )
        self._e2e = Histogram(
            "baton_e2e_seconds", "From the request's first byte to its end.", buckets=_E2E_BUCKETS_S, registry=registry
        )
        self._phase = Histogram(
            "baton_phase_seconds",
            "Exclusive parts of the time to first token.",
            ["phase"],
            buckets=_PHASE_BUCKETS_S,
            registry=registry,
        )
        self._transfer = Histogram(
            "baton_kv_transfer_seconds",
            "From grant to verified commit.",
            buckets=_TRANSFER_BUCKETS_S,
            registry=registry,
        )
        self._requests = Counter("baton_requests", "Requests that ended, by outcome.", ["outcome"], registry=registry)
        self._tokens = Counter(
            "baton_tokens", "Tokens: prompt, cached (part of prompt), completion.", ["kind"], registry=registry
        )
        self._transfer_bytes = Counter(
            "baton_kv_transfer_bytes",
            "KV bytes handed from prefill to decode workers.",
            ["transport"],
            registry=registry,
        )
        self._transfer_blocks = Counter(
            "baton_kv_transfer_blocks",
            "KV blocks of handed-over prompts: sent, or skipped as already there.",
            ["kind"],
            registry=registry,
        )
        self._fetched_blocks = Counter(
            "baton_kv_fetched_blocks",
            "KV blocks that workers got from others instead of computing them, by where they are from.",
            ["holder"],
            registry=registry,
        )
        self._fallbacks = Counter(
            "baton_fallbacks",
            "Steps down the failure ladder, by rung, and fetches that failed.",
            ["reason"],
            registry=registry,
        )
        self._retries = Counter(
            "baton_retries", "Attempts after the first, by what went wrong.", ["reason"], registry=registry
        )
        self._decisions = Counter("baton_routing_decisions", "Where requests were placed.", ["mode"], registry=registry)
        self._threshold = Gauge(
            "baton_handover_threshold_tokens",
            "Shortest new prompt that is cheaper to hand over than to prefill where it is decoded, now. +Inf: none is.",
            registry=registry,
        )
        self._compared = Counter(
            "baton_decisions_compared",
            "Decisions compared with the other way, by whether they turned out cheaper.",
            ["prompt_tokens", "mode", "paid"],
            registry=registry,
        )
        self._regret = Counter(
            "baton_decisions_regret_seconds",
            "By how much decisions turned out dearer than the other way.",
            ["prompt_tokens", "mode"],
            registry=registry,
        )
        self._slo_met = Counter("baton_slo_met", "Requests within their service level.", ["class"], registry=registry)
        self._slo_missed = Counter(
            "baton_slo_missed", "Requests outside it, and refused ones.", ["class", "reason"], registry=registry
        )
        self._in_flight = Gauge(
            "baton_gateway_requests_in_flight", "Admitted and not ended at this gateway.", registry=registry
        )
        self._fenced = Gauge(
            "baton_gateway_fenced_outputs", "Outputs of attempts that were over, not served.", registry=registry
        )
        self._bus_connected = Gauge("baton_bus_connected", "1 while NATS is there.", registry=registry)
        self._bus_dropped = Gauge(
            "baton_bus_dropped_messages", "Messages given up since start, by reason.", ["reason"], registry=registry
        )
        Gauge("baton_build_info", "Always 1.", ["version"], registry=registry).labels(version).set(1)
        registry.register(_WorkerCollector(worker_statuses, num_waiting))

    def request_admitted(self) -> None:
        self._in_flight.inc()

    def request_ended(self, trace: Trace, outcome: str, *, completion_tokens: int) -> None:
        """Once for every request that ``request_admitted`` was called for."""
        self._in_flight.dec()
        self._requests.labels(outcome).inc()
        received, first, ended = (trace.at(i) for i in (Instant.RECEIVED, Instant.FIRST_TOKEN, Instant.ENDED))
        if received is not None and first is not None:
            self._ttft.observe(first - received)
            for phase, duration_ms in trace.phases_ms().items():
                self._phase.labels(phase.value).observe(duration_ms / 1e3)
        if received is not None and ended is not None:
            self._e2e.observe(ended - received)
        if first is not None and ended is not None and completion_tokens > 1:
            self._tpot.observe((ended - first) / (completion_tokens - 1))
        self._tokens.labels("completion").inc(completion_tokens)

    def request_refused(self, slo_class: str) -> None:
        """Turned away before admission."""
        self._requests.labels("refused").inc()
        self._slo_missed.labels(slo_class, "refused").inc()

    def prompt_computed(self, *, prompt_tokens: int, cached_tokens: int) -> None:
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("cached").inc(cached_tokens)

    def slo_met(self, slo_class: str) -> None:
        self._slo_met.labels(slo_class).inc()

    def slo_missed(self, slo_class: str, reason: str) -> None:
        """``reason``: "ttft", "tpot" or "error"."""
        self._slo_missed.labels(slo_class, reason).inc()

    def placed(self, mode: str) -> None:
        """``mode``: "remote", "local" or "colocated"."""
        self._decisions.labels(mode).inc()

    def compared(self, comparison: Comparison) -> None:
        """A decision has turned out as it did."""
        regret_s = comparison.regret_s
        if regret_s is not None:
            paid = "no" if regret_s > 0 else "yes"
            self._compared.labels(comparison.bucket, comparison.mode.value, paid).inc()
            self._regret.labels(comparison.bucket, comparison.mode.value).inc(regret_s)

    def kv_transferred(self, report: common_pb2.TransferReport) -> None:
        self._transfer.observe(report.duration_ms / 1e3)
        self._transfer_bytes.labels(report.transport).inc(report.num_bytes)
        self._transfer_blocks.labels("sent").inc(report.num_blocks)
        self._transfer_blocks.labels("skipped").inc(report.num_blocks_skipped)

    def kv_fetched(self, report: common_pb2.FetchReport) -> None:
        self._fetched_blocks.labels(report.holder).inc(report.num_blocks)

    def fell_back(self, reason: str) -> None:
        self._fallbacks.labels(reason).inc()

    def retried(self, reason: str) -> None:
        self._retries.labels(reason).inc()

    def fenced(self, num_outputs: int) -> None:
        self._fenced.set(num_outputs)

    def handover_threshold(self, num_tokens: int | None) -> None:
        """None: no prompt is worth handing over."""
        self._threshold.set(math.inf if num_tokens is None else num_tokens)

    def bus_state(self, is_connected: bool, num_dropped: dict[str, int]) -> None:
        self._bus_connected.set(is_connected)
        for reason, count in num_dropped.items():
            self._bus_dropped.labels(reason).set(count)

    def render(self) -> bytes:
        """The page that Prometheus reads; its type is CONTENT_TYPE."""
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    """Reads the workers' latest statuses at the time of the scrape."""

    def __init__(self, worker_statuses: WorkerStatuses, num_waiting: Callable[[], int]) -> None:
        self._worker_statuses = worker_statuses
        self._num_waiting = num_waiting

    def describe(self) -> list[Metric]:
        return []  # asked at registration, when there are no workers to read names from

    def collect(self) -> Iterator[Metric]:
        statuses = list(self._worker_statuses())
        totals = {
            "baton_queued_requests": (
                "Requests waiting for a worker, or on one for their first step.",
                sum(s.queued for s in statuses) + self._num_waiting(),
            ),
            "baton_running_requests": ("Requests in running batches, all workers.", sum(s.running for s in statuses)),
            "baton_kv_blocks_overdue": ("Blocks held past their deadline.", sum(s.overdue for s in statuses)),
            "baton_kv_ledger_error": (
                "Blocks unaccounted for: 0, or a bug.",
                sum(abs(s.ledger_error) for s in statuses),
            ),
            "baton_workers": ("Workers known to this gateway.", len(statuses)),
        }
        for name, (text, value) in totals.items():
            yield GaugeMetricFamily(name, text, value=value)

        unhealthy = GaugeMetricFamily(
            "baton_worker_unhealthy", "1 while the worker takes nothing new: too much in quarantine.", labels=["worker"]
        )
        for status in statuses:
            is_unhealthy = status.state == common_pb2.WORKER_STATE_UNHEALTHY
            unhealthy.add_metric([status.identity.worker_id], int(is_unhealthy))
        yield unhealthy
        blocks = GaugeMetricFamily(
            "baton_kv_blocks", "Blocks of each worker's pool by state.", labels=["pool", "state"]
        )
        transfers = CounterMetricFamily(
            "baton_worker_kv_received_bytes", "KV bytes received.", labels=["worker", "transport"]
        )
        # By whose room it was, not by tenant: tenants are as many as there are keys.
        evicted = CounterMetricFamily(
            "baton_kv_evicted_blocks", "Cached blocks that made room.", labels=["worker", "room_for"]
        )
        for status in statuses:
            evicted.add_metric([status.identity.worker_id, "same_tenant"], status.evicted_for_own_total)
            evicted.add_metric([status.identity.worker_id, "other_tenant"], status.evicted_for_others_total)
            for state in BLOCK_STATES:
                blocks.add_metric([status.identity.worker_id, state], getattr(status.kv_blocks, state))
            for transport, num_bytes in status.kv_transfer_bytes_total.items():
                transfers.add_metric([status.identity.worker_id, transport], num_bytes)
        yield blocks
        yield transfers
        yield evicted

        for gauge, text, field in (
            ("baton_worker_queued_requests", "Requests waiting for their first step.", "queued"),
            ("baton_worker_queued_tokens", "Prompt tokens waiting to be computed.", "queued_tokens"),
            ("baton_worker_running_requests", "Requests in the running batch.", "running"),
            ("baton_worker_decode_step_seconds", "Duration of a decode step lately.", "decode_step_s"),
            ("baton_sessions", "Conversations whose blocks are kept between turns.", "sessions"),
            ("baton_kv_retained_bytes", "KV bytes that conversations keep; can be given out.", "retained_bytes"),
            ("baton_kv_retained_bytes_budget", "Most KV bytes that they may keep.", "retained_bytes_budget"),
            ("baton_kv_cache_tenants", "Tenants that have blocks in the pool, or sessions.", "cache_tenants"),
        ):
            family = GaugeMetricFamily(gauge, text, labels=["worker"])
            for status in statuses:
                family.add_metric([status.identity.worker_id], getattr(status, field))
            yield family
        for counter, text, field in (
            ("baton_worker_prompt_tokens", "Prompt tokens computed.", "prompt_tokens_total"),
            ("baton_worker_generation_tokens", "Tokens generated.", "generation_tokens_total"),
            ("baton_worker_preemptions", "Requests put back to make room.", "preemptions_total"),
            ("baton_worker_out_of_memory", "Engine steps that did not fit into memory.", "out_of_memory_total"),
            ("baton_worker_fenced", "Messages refused as stale, late or not granted.", "fenced_total"),
            ("baton_worker_corrupt_blocks", "Blocks that arrived with a wrong checksum.", "corrupt_blocks_total"),
        ):
            counters = CounterMetricFamily(counter, text, labels=["worker"])
            for status in statuses:
                counters.add_metric([status.identity.worker_id], getattr(status, field))
            yield counters
