"""A whole installation whose caches one tenant floods: what another one finds again there afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.simulation import gateway
from helpers.simulation.clients import Ask
from helpers.simulation.model import VOCABULARY
from helpers.simulation.scenario import Scenario, WorkerSpec
from helpers.simulation.world import run_seed

from baton.services.core.request import SamplingParams
from baton.services.core.router import Placement
from baton.services.core.tenants import Tenant
from baton.services.gateway.receipts import GenerationRecord, ReceiptBook

NUM_VICTIMS, VICTIM_TOKENS = 3, 24
NUM_FLOOD, FLOOD_TOKENS = 80, 40
SETTINGS = {"max_num_seqs": 2, "max_num_batched_tokens": 48, "transport": "tcp"}


def ask(name: str, at_s: float, prompt: list[int], tenant: str) -> Ask:
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    return Ask(name, at_s, prompt, sampling, salt=f"{tenant}/", timeout_s=240.0, tenant=Tenant(tenant, tenant))


def scenario(seed: int, flooding: str) -> Scenario:
    """The victim asks twice; then comes the flood, of another tenant or its own; then the victim asks again."""
    workers = [WorkerSpec(role, 0, 48, 0.005, 1e-5, dict(SETTINGS)) for role in ("prefill", "decode")]
    asks = []
    for number in range(NUM_VICTIMS):
        prompt = [1 + (number * 7 + index) % (VOCABULARY - 1) for index in range(VICTIM_TOKENS)]
        asks += [
            ask(f"{when}-{number}", at_s, prompt, "victim") for when, at_s in (("1", 0.0), ("2", 5.0), ("3", 60.0))
        ]
    for number in range(NUM_FLOOD):
        prompt = [1 + (seed + number * 11 + index * 5) % (VOCABULARY - 1) for index in range(FLOOD_TOKENS)]
        prompt[:2] = [1 + number % (VOCABULARY - 1), 1 + number // 7]
        asks.append(ask(f"flood-{number}", 10.0 + number * 0.3, prompt, flooding))
    return Scenario(seed, workers, asks, [], Placement.REMOTE, socket_bytes=1 << 16, bytes_per_s=1e9)


@pytest.mark.parametrize("seed", range(2))
def test_a_flood_takes_nothing_from_a_tenant_within_its_share(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[GenerationRecord] = []

    class Book(ReceiptBook):
        def __init__(self, on_end: Callable[[GenerationRecord], None]) -> None:
            def ended(record: GenerationRecord) -> None:
                records.append(record)
                on_end(record)

            super().__init__(ended)

    monkeypatch.setattr(gateway, "ReceiptBook", Book)
    found = {}
    for flooding in ("flood", "victim"):
        records.clear()
        outcome = run_seed(seed, make=lambda seed, flooding=flooding: scenario(seed, flooding))
        assert not outcome.problems
        assert set(outcome.ends) == {"length"}
        cached = {record.request_id: record.cached_tokens for record in records}
        found[flooding] = [sum(cached[f"{when}-{number}.0"] for number in range(NUM_VICTIMS)) for when in "123"]
    cold, before, after = found["flood"]
    assert cold == 0
    assert before == NUM_VICTIMS * (VICTIM_TOKENS - 4)  # all but the last block, of which a token is computed
    assert after >= 0.8 * before
    assert found["victim"][2] < 0.8 * before, "the flood was too small to show anything"
