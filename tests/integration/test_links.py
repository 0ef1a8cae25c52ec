"""Pairs are probed before they are needed; what is found decides where requests go and is shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import Cluster, run_cluster
from helpers.oracle import Subject, expected_tokens, make_prompt
from helpers.waiting import eventually

from baton.services.core.links import LinkMatrix, LinkState, PairKey
from baton.services.gateway.link_prober import LinkProber, describe_links
from baton.services.gateway.readiness import Readiness


@pytest.fixture
def subject(get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject("qwen3")


@asynccontextmanager
async def probing(cluster: Cluster) -> AsyncIterator[LinkMatrix]:
    links = cluster.links
    prober = asyncio.create_task(LinkProber(cluster.registry, links, clock=time.monotonic).run())
    try:
        yield links
    finally:
        prober.cancel()
        await asyncio.gather(prober, return_exceptions=True)


def pair_of(cluster: Cluster) -> PairKey:
    return PairKey(*(cluster.host(role).identity.incarnation for role in ("prefill", "decode")))


def spoil(cluster: Cluster, transport: str) -> None:
    """What lands on the decode worker by this transport is reported as corrupt."""
    agent = cluster.host("decode")._agent
    landing = agent._context.transports[transport]
    land = landing.land

    def spoiling(arrival: Any) -> Any:
        ended = arrival.ended

        def spoiled(landed: Any) -> None:
            corrupt = [*landed.corrupt, *(index for index, _ in landed.landed)]
            ended(type(landed)(landed=(), corrupt=corrupt, broken=landed.broken))

        arrival.ended = spoiled
        return land(arrival)

    landing.land = spoiling  # type: ignore[method-assign]


def links_shown(cluster: Cluster) -> Any:
    workers = describe_links(cluster.registry, cluster.links, time.monotonic())
    (shown,) = [worker["links"] for worker in workers if "links" in worker]
    return shown


async def test_a_pair_is_verified_ahead_of_need_and_transfers_add_to_what_is_known(
    subject: Subject, key_file: Path
) -> None:
    async with run_cluster(subject.loaded, key_file, transport="shm") as cluster:
        readiness = Readiness(links=cluster.links)
        is_ready, reason = readiness.check(cluster.registry.views())
        assert not is_ready
        assert reason == "no usable pair: prefill-0 to decode-1: no canary has come through yet"
        async with probing(cluster) as links:
            await eventually(lambda: links.get(pair_of(cluster)).state is LinkState.VERIFIED, timeout_s=60)
        assert readiness.check(cluster.registry.views()) == (True, "")
        prompt = make_prompt(40, seed=1)
        assert (await cluster.generate(prompt, ignore_eos=True)).token_ids == expected_tokens(subject, prompt)
        (shown,) = links_shown(cluster)
        assert shown["decode"] == "decode-1"
        assert (shown["state"], shown["transport"], shown["breaker"]) == ("verified", "shm", "closed")
        assert (shown["transfers"], shown["failures"], shown["reason"]) == (1, 0, None)
        assert shown["rtt_ms"] > 0
        assert shown["gb_per_s"] > 0


async def test_a_transport_whose_canary_is_spoilt_is_left_and_the_reason_shown(
    subject: Subject, key_file: Path
) -> None:
    async with run_cluster(subject.loaded, key_file) as cluster:
        spoil(cluster, "inproc")
        spoil(cluster, "shm")
        async with probing(cluster) as links:
            await eventually(lambda: links.get(pair_of(cluster)).state is LinkState.VERIFIED, timeout_s=60)
        (shown,) = links_shown(cluster)
        assert shown["transport"] == "tcp"
        reason = "the canary arrived corrupt"
        assert shown["failed_transports"] == [f"inproc: {reason}", f"shm: {reason}"]
        prompt = make_prompt(40, seed=2)
        assert (await cluster.generate(prompt, ignore_eos=True)).token_ids == expected_tokens(subject, prompt)
        assert cluster.ended[-1].transfer is not None
        assert cluster.ended[-1].transfer.transport == "tcp"
        assert cluster.ended[-1].fallbacks == []


async def test_a_pair_without_a_transport_that_works_takes_no_requests(subject: Subject, key_file: Path) -> None:
    async with run_cluster(subject.loaded, key_file, transport="shm") as cluster:
        spoil(cluster, "shm")
        async with probing(cluster) as links:
            await eventually(lambda: links.get(pair_of(cluster)).state is LinkState.FAILED, timeout_s=60)
            is_ready, reason = Readiness(links=links).check(cluster.registry.views())
            assert not is_ready
            assert "shm: the canary arrived corrupt" in reason
            prompt = make_prompt(40, seed=3)
            got = await cluster.generate(prompt, ignore_eos=True)
        assert got.token_ids == expected_tokens(subject, prompt)
        receipt: Any = cluster.receipts.get(got.receipt_id)
        assert receipt["decision"]["mode"] == "local"
        assert receipt["retries"] == 0  # known before, not found out by the request


async def test_a_transport_that_fails_in_the_middle_shows_in_the_receipt(subject: Subject, key_file: Path) -> None:
    async with run_cluster(subject.loaded, key_file) as cluster:
        async with probing(cluster) as links:
            await eventually(lambda: links.get(pair_of(cluster)).state is LinkState.VERIFIED, timeout_s=60)
        spoil(cluster, "inproc")
        prompt = make_prompt(40, seed=4)
        got = await cluster.generate(prompt, ignore_eos=True)
        assert got.token_ids == expected_tokens(subject, prompt)
        receipt: Any = cluster.receipts.get(got.receipt_id)
        assert receipt["transfer"]["path"] == "shm"
        assert receipt["transfer"]["fallbacks"][0].startswith("inproc: ")
        assert receipt["fallbacks"] == ["other_transport"]
        assert receipt["retries"] == 0
        assert cluster.links.get(pair_of(cluster)).transport == "shm"
        await cluster.assert_clean(timeout_s=30)


async def test_workers_with_different_blocks_make_no_pair_and_both_values_are_shown(
    subject: Subject, key_file: Path
) -> None:
    async with run_cluster(subject.loaded, key_file, prefill_settings={"block_size": 8}) as cluster:
        async with probing(cluster) as links:
            await eventually(lambda: links.get(pair_of(cluster)).state is LinkState.FAILED, timeout_s=60)
        (shown,) = links_shown(cluster)
        assert shown["reason"] == "incompatible: KV block_size: 16 here, 8 there"
        assert not cluster.host("decode")._agent._receiving._pairs
        prompt = make_prompt(40, seed=5)
        assert (await cluster.generate(prompt, ignore_eos=True)).token_ids == expected_tokens(subject, prompt)
