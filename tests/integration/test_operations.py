"""What operators do with running workers: look into the ledger, and take one out of use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import Cluster, run_cluster
from helpers.oracle import Subject, make_prompt
from helpers.waiting import eventually

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.failpoints import parse_failpoints
from baton.services.engine.loader import LoadedModel
from baton.services.gateway.worker_calls import WorkerCalls
from baton.services.runtime.failpoints import set_failpoints

# A hundred tokens last half a second on any machine: what is looked at as it runs does run.
SLOW = "decode.step_n=delay(5)"


@pytest.fixture
def loaded(get_subject: Callable[[str], Subject]) -> LoadedModel:
    return get_subject("qwen3").loaded


async def all_blocks(calls: WorkerCalls, worker_id: str, **query: Any) -> list[dict[str, Any]]:
    page = await calls.blocks(worker_id, **{"overdue": False, "cached": False, "first": 0, "limit": 1000, **query})
    return list(page["data"])


async def until_running(cluster: Cluster, calls: WorkerCalls) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    async def is_running() -> bool:
        rows[:] = await all_blocks(calls, "decode-1")
        return any(row["phase"] == "running" for row in rows)

    async with asyncio.timeout(60):
        while not await is_running():
            await asyncio.sleep(0.01)
    return rows


async def test_the_ledger_of_a_running_worker_names_the_request(loaded: LoadedModel, key_file: Path) -> None:
    async with run_cluster(loaded, key_file, failpoints=SLOW) as cluster:
        calls = WorkerCalls(cluster.registry)
        running = asyncio.create_task(cluster.generate(make_prompt(40), max_tokens=400, ignore_eos=True))
        rows = await until_running(cluster, calls)
        row = next(row for row in rows if row["phase"] == "running")
        assert (row["state"], row["attempt"], row["overdue"]) == ("request", 1, False)
        assert row["request_id"].startswith("test-")
        assert row["age_s"] >= 0
        assert await all_blocks(calls, "decode-1", overdue=True) == []
        await running
        await cluster.assert_clean()
        assert await all_blocks(calls, "decode-1") == []
        assert {row["state"] for row in await all_blocks(calls, "decode-1", cached=True)} == {"cached"}
        with pytest.raises(BatonError) as caught:
            await calls.blocks("nobody", overdue=False, cached=False, first=0, limit=10)
        assert caught.value.code is ErrorCode.NOT_FOUND


async def test_a_drain_waits_for_what_runs_and_then_nothing_is_held(loaded: LoadedModel, key_file: Path) -> None:
    async with run_cluster(loaded, key_file, num_decode=1, failpoints=SLOW) as cluster:
        calls = WorkerCalls(cluster.registry)
        running = asyncio.create_task(cluster.generate(make_prompt(40), max_tokens=100, ignore_eos=True))
        await until_running(cluster, calls)
        assert await calls.drain("decode-1", 120.0) == {"id": "decode-1", "state": "drained", "given_up": 0}
        assert len((await running).token_ids) == 100
        for worker_id in ("prefill-0", "decode-1"):
            assert await all_blocks(calls, worker_id) == []


async def test_a_drain_waits_for_a_transfer_that_nobody_has_acknowledged(loaded: LoadedModel, key_file: Path) -> None:
    """The request is over for its gateway, and its blocks may still be read."""
    async with run_cluster(loaded, key_file, failpoints="on") as cluster:
        calls = WorkerCalls(cluster.registry)
        set_failpoints(parse_failpoints("kv.commit.before=hang"))
        running = asyncio.create_task(cluster.generate(make_prompt(40), max_tokens=20, ignore_eos=True))
        host = cluster.host("prefill")

        def is_handing_over() -> bool:
            return host._agent.stats().num_sending == 1 and bool(host._report.stats.handing_over)

        await eventually(is_handing_over, timeout_s=60, what="the commit to be held up")
        draining = asyncio.create_task(calls.drain("prefill-0", 120.0))
        await eventually(lambda: host.worker.is_draining, timeout_s=60, what="the drain")
        assert [row["phase"] for row in await all_blocks(calls, "prefill-0")] == ["handing_over"] * 3
        assert not draining.done()
        set_failpoints([])
        assert (await draining)["given_up"] == 0
        assert len((await running).token_ids) == 20
        assert await all_blocks(calls, "prefill-0") == []
