"""Faults under answers that prefill workers give whole: all invariants hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers.simulation.scenario import Scenario, draw_scenario
from helpers.simulation.world import run_seed

from baton.services.core.request import Request
from baton.services.core.router import Placement
from baton.services.core.scheduler.prefill import PrefillScheduler


def adaptive(seed: int, **narrowed: Any) -> Scenario:
    """The seed's scenario, where prices decide who does what."""
    scenario = draw_scenario(seed, **narrowed)
    scenario.placement = Placement.AUTO
    return scenario


def test_no_invariant_is_violated_where_prefill_workers_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    added: Counter[bool] = Counter()
    add = PrefillScheduler.add

    def count(self: PrefillScheduler, request: Request, *, is_whole: bool = False) -> None:
        added[is_whole] += 1
        add(self, request, is_whole=is_whole)

    monkeypatch.setattr(PrefillScheduler, "add", count)
    for seed in range(1000, 1025):
        outcome = run_seed(seed, make=adaptive)
        assert not outcome.problems, f"seed {seed}: {outcome.problems}"
    assert added[True] > 20, added
    assert added[False] > 20, added
