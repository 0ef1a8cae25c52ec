"""Metrics agree with the receipt's trace and with what workers say."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.api.common.v1 import common_pb2
from baton.services.core.lifecycle import Instant, Trace
from baton.services.runtime.metrics import Metrics

# Dashboards and alerts rely on these names.
CONTRACT_NAMES = [
    "baton_ttft_seconds",
    "baton_tpot_seconds",
    "baton_e2e_seconds",
    "baton_phase_seconds",
    "baton_kv_transfer_seconds",
    "baton_requests_total",
    "baton_tokens_total",
    "baton_kv_transfer_bytes_total",
    "baton_fallbacks_total",
    "baton_slo_met_total",
    "baton_slo_missed_total",
    "baton_queued_requests",
    "baton_running_requests",
    "baton_kv_blocks",
    "baton_kv_blocks_overdue",
    "baton_kv_ledger_error",
]


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def trace_of_a_remote_request() -> Trace:
    trace = Trace()
    for instant, at_s in (
        (Instant.RECEIVED, 10.0),
        (Instant.ADMITTED, 10.001),
        (Instant.TOKENIZED, 10.003),
        (Instant.ROUTED, 10.004),
        (Instant.PREFILL_START, 10.010),
        (Instant.PREFILL_END, 10.110),
        (Instant.FIRST_TOKEN, 10.120),
        (Instant.ENDED, 10.320),
    ):
        trace.mark(instant, at_s)
    return trace


def test_all_names_of_the_contract_are_exported() -> None:
    text = Metrics().render().decode()
    for name in CONTRACT_NAMES:
        base = name.removesuffix("_total")
        assert f"# TYPE {name} " in text or f"# TYPE {base}_total " in text, name


def test_a_finished_request_is_observed_once_in_every_time() -> None:
    metrics = Metrics()
    metrics.request_admitted()
    assert value(metrics, "baton_gateway_requests_in_flight") == 1
    metrics.prompt_computed(prompt_tokens=100, cached_tokens=32)
    metrics.request_ended(trace_of_a_remote_request(), "length", completion_tokens=5)
    assert value(metrics, "baton_gateway_requests_in_flight") == 0
    assert value(metrics, "baton_requests_total", outcome="length") == 1
    assert value(metrics, "baton_ttft_seconds_sum") == pytest.approx(0.120)
    assert value(metrics, "baton_e2e_seconds_sum") == pytest.approx(0.320)
    assert value(metrics, "baton_tpot_seconds_sum") == pytest.approx(0.200 / 4)
    phases = {labels[0][1]: v for (name, labels), v in samples(metrics).items() if name == "baton_phase_seconds_sum"}
    assert sum(phases.values()) == pytest.approx(0.120), "phases are exclusive and sum to the time to first token"
    assert phases["prefill"] == pytest.approx(0.100)
    assert {kind: value(metrics, "baton_tokens_total", kind=kind) for kind in ("prompt", "cached", "completion")} == {
        "prompt": 100,
        "cached": 32,
        "completion": 5,
    }


def test_a_request_that_ended_before_its_first_token_has_no_first_token_time() -> None:
    metrics = Metrics()
    trace = Trace()
    trace.mark(Instant.RECEIVED, 1.0)
    trace.mark(Instant.ENDED, 2.0)
    metrics.request_admitted()
    metrics.request_ended(trace, "abort", completion_tokens=0)
    assert value(metrics, "baton_ttft_seconds_count") == 0
    assert value(metrics, "baton_e2e_seconds_count") == 1
    assert value(metrics, "baton_requests_total", outcome="abort") == 1


def test_one_token_has_no_time_per_output_token() -> None:
    metrics = Metrics()
    metrics.request_admitted()
    metrics.request_ended(trace_of_a_remote_request(), "length", completion_tokens=1)
    assert value(metrics, "baton_tpot_seconds_count") == 0


def test_service_levels_transfers_and_fallbacks_are_counted_by_label() -> None:
    metrics = Metrics()
    metrics.slo_met("interactive")
    metrics.slo_missed("batch", "ttft")
    metrics.request_refused("standard")
    metrics.fell_back("no_capacity")
    metrics.retried("worker_lost")
    metrics.placed("remote")
    metrics.kv_transferred(
        common_pb2.TransferReport(transport="shm", num_blocks=7, num_blocks_skipped=2, num_bytes=4096, duration_ms=3.0)
    )
    metrics.bus_state(False, {"disconnected": 4})
    assert value(metrics, "baton_slo_met_total", **{"class": "interactive"}) == 1
    assert value(metrics, "baton_slo_missed_total", **{"class": "batch", "reason": "ttft"}) == 1
    assert value(metrics, "baton_slo_missed_total", **{"class": "standard", "reason": "refused"}) == 1
    assert value(metrics, "baton_requests_total", outcome="refused") == 1
    assert value(metrics, "baton_fallbacks_total", reason="no_capacity") == 1
    assert value(metrics, "baton_retries_total", reason="worker_lost") == 1
    assert value(metrics, "baton_routing_decisions_total", mode="remote") == 1
    assert value(metrics, "baton_kv_transfer_bytes_total", transport="shm") == 4096
    assert value(metrics, "baton_kv_transfer_blocks_total", kind="skipped") == 2
    assert value(metrics, "baton_kv_transfer_seconds_sum") == pytest.approx(0.003)
    assert value(metrics, "baton_bus_connected") == 0
    assert value(metrics, "baton_bus_dropped_messages", reason="disconnected") == 4


@pytest.mark.parametrize(("num_tokens", "shown"), [(96, 96.0), (None, float("inf"))])
def test_the_threshold_is_infinite_where_nothing_is_handed_over(num_tokens: int | None, shown: float) -> None:
    metrics = Metrics()
    metrics.handover_threshold(num_tokens)
    assert value(metrics, "baton_handover_threshold_tokens") == shown


def worker(worker_id: str, **fields: object) -> common_pb2.WorkerStatus:
    return common_pb2.WorkerStatus(identity=common_pb2.WorkerIdentity(worker_id=worker_id), **fields)  # type: ignore[arg-type]


def test_worker_figures_are_read_at_the_scrape_and_leave_with_the_worker() -> None:
    counts = common_pb2.KVBlockCounts(total=10, free=4, cached=3, request=2, transfer=1)
    statuses = [
        worker(
            "p-0", queued=3, running=1, kv_blocks=counts, overdue=1, ledger_error=-2, kv_transfer_bytes_total={"tcp": 9}
        ),
        worker(
            "d-0",
            queued=4,
            running=2,
            ledger_error=2,
            sessions=3,
            retained_bytes=640,
            retained_bytes_budget=1280,
            cache_tenants=2,
            evicted_for_own_total=8,
            evicted_for_others_total=5,
        ),
    ]
    metrics = Metrics(lambda: statuses, version="0.1.0")
    assert value(metrics, "baton_queued_requests") == 7
    assert value(metrics, "baton_running_requests") == 3
    assert value(metrics, "baton_kv_blocks_overdue") == 1
    assert value(metrics, "baton_kv_ledger_error") == 4, "errors of opposite sign must not cancel out"
    assert value(metrics, "baton_build_info", version="0.1.0") == 1
    states = {"free": 4, "cached": 3, "request": 2, "transfer": 1, "quarantine": 0}
    assert {s: value(metrics, "baton_kv_blocks", pool="p-0", state=s) for s in states} == states
    assert value(metrics, "baton_worker_queued_requests", worker="d-0") == 4
    assert value(metrics, "baton_worker_kv_received_bytes_total", worker="p-0", transport="tcp") == 9
    assert value(metrics, "baton_sessions", worker="d-0") == 3
    assert value(metrics, "baton_kv_retained_bytes", worker="d-0") == 640
    assert value(metrics, "baton_kv_retained_bytes_budget", worker="d-0") == 1280
    assert value(metrics, "baton_kv_cache_tenants", worker="d-0") == 2
    assert value(metrics, "baton_kv_evicted_blocks_total", worker="d-0", room_for="same_tenant") == 8
    assert value(metrics, "baton_kv_evicted_blocks_total", worker="d-0", room_for="other_tenant") == 5
    statuses.clear()
    assert not [labels for _, labels in samples(metrics) if ("pool", "p-0") in labels or ("worker", "d-0") in labels]
    assert value(metrics, "baton_kv_ledger_error") == 0


def test_requests_that_wait_at_the_gateway_count_as_queued() -> None:
    statuses = [common_pb2.WorkerStatus(queued=2), common_pb2.WorkerStatus(queued=1)]
    assert value(Metrics(lambda: statuses, num_waiting=lambda: 4), "baton_queued_requests") == 7
