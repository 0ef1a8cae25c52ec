"""Whole installations in which every block that another worker holds is fetched, under the same faults and invariants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers.simulation import gateway
from helpers.simulation.world import run_seed

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.fetch import FetchMode, FetchPolicy
from baton.services.gateway.dispatch import WorkerDispatcher
from baton.services.worker.fetching import BlockFetcher

# In most of these something is fetched; in 9 there is no room for it, in 46 the holder stops answering.
SEEDS = (4, 5, 9, 19, 24, 26, 32, 36, 37, 46)


class AlwaysFetching(WorkerDispatcher):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, fetch=FetchPolicy(FetchMode.ALWAYS), **options)


def test_no_invariant_is_violated_where_blocks_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: Counter[str] = Counter()
    fetch = BlockFetcher.fetch

    async def counted(self: BlockFetcher, *arguments: Any) -> pb.FetchReport | None:
        report = await fetch(self, *arguments)
        if report is not None:
            reports[report.error.code or "came"] += 1
        return report

    monkeypatch.setattr(BlockFetcher, "fetch", counted)
    monkeypatch.setattr(gateway, "WorkerDispatcher", AlwaysFetching)
    for seed in SEEDS:
        outcome = run_seed(seed)
        assert not outcome.problems, f"seed {seed}: {outcome.problems}"
    assert reports["came"] > 0, f"nothing was fetched, so nothing was tried: {reports}"
