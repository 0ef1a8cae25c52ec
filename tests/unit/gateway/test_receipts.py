"""Receipts: one for each response, the newest ones, with phases that sum to the time to first token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.services.core.lifecycle import Instant, Trace
from baton.services.core.request import SamplingParams
from baton.services.core.router import Role, RoutedRequest, WorkerView, route
from baton.services.core.tenants import Tenant
from baton.services.gateway.generation import GenerationRequest, SloTarget
from baton.services.gateway.receipts import Attempt, GenerationRecord, ReceiptBook

WORKERS = [
    WorkerView("p0", "i", Role.PREFILL, "127.0.0.1:1", "same"),
    WorkerView("d0", "i", Role.DECODE, "127.0.0.1:2", "same"),
]


def request(request_id: str, receipt_id: str = "r", slo: SloTarget | None = None) -> GenerationRequest:
    trace = Trace({Instant.RECEIVED: 1.0, Instant.FIRST_TOKEN: 1.2, Instant.ENDED: 2.16})
    params = SamplingParams(max_tokens=8)
    return GenerationRequest(request_id, receipt_id, "m", [1, 2, 3], params, slo=slo or SloTarget(), trace=trace)


@pytest.fixture
def ended() -> list[GenerationRecord]:
    return []


@pytest.fixture
def book(ended: list[GenerationRecord]) -> ReceiptBook:
    return ReceiptBook(ended.append, max_receipts=3)


def test_a_receipt_tells_decision_phases_and_figures(book: ReceiptBook) -> None:
    record = book.open(request("x.0"))
    decision = route(RoutedRequest("x", 3, 16, 1024, {}), WORKERS)
    record.attempts.append(Attempt(1, decision))
    record.completion_tokens = 5
    book.end(record, "length")
    receipt = book.get("r")
    assert receipt is not None
    assert receipt["decision"]["mode"] == "remote"  # type: ignore[index]
    assert receipt["decision"]["runner_up"]["mode"] == "local"  # type: ignore[index]
    assert receipt["ttft_ms"] == pytest.approx(200)
    assert receipt["tpot_ms"] == pytest.approx(240)
    assert sum(receipt["phases_ms"].values()) == pytest.approx(200)  # type: ignore[attr-defined]
    assert receipt["slo"] == {"class": "standard", "ttft_ms": 5000.0, "tpot_ms": 250.0, "met": True}
    assert receipt["transfer"] is None


def test_a_receipt_is_its_tenants_and_operators_see_all(book: ReceiptBook) -> None:
    """Two tenants may choose the same x-request-id."""
    for tenant in ("one", "other"):
        theirs = replace(request(f"{tenant}.0", "same"), tenant=Tenant(tenant, tenant), model=f"model of {tenant}")
        book.end(book.open(theirs), "stop")

    def model(tenant_id: str | None) -> object:
        receipt = book.get("same", tenant_id)
        return None if receipt is None else receipt["model"]

    assert [model(tenant_id) for tenant_id in ("one", "other", "third", None)] == [
        *("model of one", "model of other", None, "model of other"),
    ]


def test_choices_of_one_response_are_one_receipt(book: ReceiptBook) -> None:
    for index in range(3):
        record = book.open(request(f"x.{index}"))
        record.completion_tokens = 4
        book.end(record, "stop")
    receipt = book.get("r")
    assert receipt is not None
    assert receipt["completion_tokens"] == 12
    assert len(receipt["choices"]) == 3  # type: ignore[arg-type]


def test_a_client_that_repeats_its_id_gets_the_newest_response(book: ReceiptBook) -> None:
    book.open(request("x.0")).completion_tokens = 4
    book.open(request("y.0")).completion_tokens = 7
    receipt = book.get("r")
    assert receipt is not None
    assert receipt["completion_tokens"] == 7


def test_only_the_newest_are_kept(book: ReceiptBook) -> None:
    for name in "abcd":
        book.open(request(f"{name}.0", receipt_id=name))
    assert book.get("a") is None
    assert book.get("b") is not None


def test_a_record_ends_once(book: ReceiptBook, ended: list[GenerationRecord]) -> None:
    record = book.open(request("x.0"))
    book.end(record, "stop")
    book.end(record, "abort")
    assert [r.outcome for r in ended] == ["stop"]


@pytest.mark.parametrize(
    ("slo", "outcome", "met", "reason"),
    [
        (SloTarget(ttft_ms=100.0), "stop", False, "ttft"),
        (SloTarget(tpot_ms=200.0), "stop", False, "tpot"),
        (SloTarget(ttft_ms=300.0, tpot_ms=300.0), "stop", True, None),
        (SloTarget("batch"), "length", True, None),
        (SloTarget("batch"), "error", False, "error"),
        (SloTarget("batch"), "refused", False, "refused"),
    ],
)
def test_service_levels(book: ReceiptBook, slo: SloTarget, outcome: str, met: bool, reason: str | None) -> None:
    record = book.open(request("x.0", slo=slo))
    record.completion_tokens = 5
    book.end(record, outcome)
    assert record.slo_met is met
    if reason is not None:
        assert record.missed_because == reason
