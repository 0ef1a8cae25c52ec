"""Workers that go away, refuse or do not fit: the answer is the same, or the error is clear, and nothing stays held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import Cluster, run_cluster
from helpers.oracle import Subject, expected_tokens, make_prompt
from helpers.waiting import eventually

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.lifecycle import Instant
from baton.services.core.request import SamplingParams
from baton.services.gateway.generation import GenerationRequest


@pytest.fixture
def subject(get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject("qwen3")


def request(name: str, prompt: tuple[int, ...], *, max_tokens: int = 24, timeout_s: float = 30.0) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    made = GenerationRequest(name, name, "test", list(prompt), params, timeout_s=timeout_s)
    made.trace.mark(Instant.RECEIVED, 0.0)
    return made


async def stop_host(cluster: Cluster, worker_id: str) -> None:
    host = next(host for host in cluster.hosts if host.identity.worker_id == worker_id)
    cluster.hosts.remove(host)
    await host.stop()


@pytest.mark.parametrize("stopped_after", [1, 2, 7])
async def test_a_decode_worker_that_stops_mid_stream_changes_no_token(
    subject: Subject, key_file: Path, stopped_after: int
) -> None:
    """Another worker goes on from the prompt and the tokens so far; indices have no gap."""
    prompt = make_prompt(40, seed=1)
    async with run_cluster(subject.loaded, key_file, num_decode=2, keep_stopped=True) as cluster:
        tokens: list[int] = []
        indices: list[int] = []
        generation = cluster.dispatcher.generate(request("r.0", prompt))
        stopping: asyncio.Task[None] | None = None
        async for delta in generation:
            indices += range(delta.first_index, delta.first_index + len(delta.tokens))
            tokens += [token.token_id for token in delta.tokens]
            if len(tokens) >= stopped_after and stopping is None:
                receipt: Any = cluster.receipts.get("r.0")
                stopping = asyncio.create_task(stop_host(cluster, receipt["decision"]["decode"]))
                await asyncio.sleep(0)
        assert stopping is not None
        await stopping
        assert tokens == expected_tokens(subject, prompt)
        assert indices == list(range(24))
        await cluster.assert_clean()


async def test_without_a_prefill_worker_the_decode_worker_prefills(subject: Subject, key_file: Path) -> None:
    prompt = make_prompt(130, seed=2)
    async with run_cluster(subject.loaded, key_file, keep_stopped=True) as cluster:
        await stop_host(cluster, "prefill-0")
        await eventually(lambda: len(cluster.registry.views()) == 1, what="the gateway's noticing")
        generated = await cluster.generate(prompt, ignore_eos=True)
        assert generated.token_ids == expected_tokens(subject, prompt)
        receipt: Any = cluster.receipts.get(generated.receipt_id)
        assert receipt["decision"]["mode"] == "local"
        await cluster.assert_clean()


async def test_without_a_decode_worker_the_error_says_so(subject: Subject, key_file: Path) -> None:
    async with run_cluster(subject.loaded, key_file, keep_stopped=True) as cluster:
        await stop_host(cluster, "decode-1")
        await eventually(lambda: len(cluster.registry.views()) == 1, what="the gateway's noticing")
        with pytest.raises(BatonError, match="no usable decode worker") as failure:
            await cluster.generate(make_prompt(5), timeout_s=0.2)
        assert failure.value.code is ErrorCode.NO_WORKERS
        await cluster.assert_clean()


async def test_workers_whose_blocks_differ_never_pair(subject: Subject, key_file: Path) -> None:
    """A prefill worker with another block size is known, and never used."""
    prompt = make_prompt(50, seed=3)
    async with run_cluster(subject.loaded, key_file, prefill_settings={"block_size": 32}) as cluster:
        generated = await cluster.generate(prompt, ignore_eos=True)
        assert generated.token_ids == expected_tokens(subject, prompt)
        receipt: Any = cluster.receipts.get(generated.receipt_id)
        assert receipt["decision"]["mode"] == "local"
        assert receipt["retries"] == 0


async def test_a_handoff_that_is_refused_falls_back_and_is_told(
    subject: Subject, key_file: Path, tmp_path: Path
) -> None:
    """Workers that name blocks by different keys look alike to the router; the handoff finds out, and the request lives."""
    prompt = make_prompt(50, seed=4)
    other_key = tmp_path / "other-key"
    other_key.write_bytes(b"quite another key")
    async with run_cluster(subject.loaded, key_file, prefill_settings={"block_key_file": other_key}) as cluster:
        generated = await cluster.generate(prompt, ignore_eos=True)
        assert generated.token_ids == expected_tokens(subject, prompt)
        assert generated.indices == list(range(24))
        receipt: Any = cluster.receipts.get(generated.receipt_id)
        assert receipt["retries"] == 1
        assert receipt["fallbacks"] == ["local_prefill"]
        assert receipt["attempts"][1]["mode"] == "local"
        await cluster.assert_clean()


async def test_a_pool_too_small_for_all_at_once_serves_them_one_after_the_other(
    subject: Subject, key_file: Path
) -> None:
    """16 requests of up to 11 blocks each over 20 blocks: reservations wait, nothing deadlocks, nothing is wrong."""
    prompts = [make_prompt(90 + 3 * index, seed=index) for index in range(16)]
    async with run_cluster(subject.loaded, key_file, num_blocks=20, max_model_len=200) as cluster:
        for prompt, generated in zip(prompts, await cluster.generate_all(prompts, ignore_eos=True), strict=True):
            assert generated.token_ids == expected_tokens(subject, prompt)
        await cluster.assert_clean()


async def test_a_request_whose_time_is_over_ends_with_that_error(subject: Subject, key_file: Path) -> None:
    async with run_cluster(subject.loaded, key_file) as cluster:
        with pytest.raises(BatonError) as failure:
            async for _ in cluster.dispatcher.generate(
                request("late.0", make_prompt(20), max_tokens=900, timeout_s=0.2)
            ):
                pass
        assert failure.value.code is ErrorCode.DEADLINE_EXCEEDED
        receipt: Any = cluster.receipts.get("late.0")
        assert receipt["outcome"] == "error"
        await cluster.assert_clean()


async def test_a_request_that_ends_with_its_first_token_needs_no_handoff(subject: Subject, key_file: Path) -> None:
    prompt = make_prompt(40, seed=5)
    first = expected_tokens(subject, prompt)[0]
    async with run_cluster(subject.loaded, key_file) as cluster:
        one = await cluster.generate(prompt, max_tokens=1)
        assert one.token_ids == [first]
        stopped = await cluster.generate(prompt, stop_token_ids=frozenset({first}))
        assert stopped.token_ids == [first]
        assert stopped.finish_reason == "stop"
        await cluster.assert_clean()
        for receipt_id in (one.receipt_id, stopped.receipt_id):
            receipt: Any = cluster.receipts.get(receipt_id)
            assert receipt["transfer"] is None
            assert receipt["retries"] == 0


async def test_closing_the_generator_in_any_phase_frees_everything(subject: Subject, key_file: Path) -> None:
    async with run_cluster(subject.loaded, key_file, max_num_batched_tokens=64) as cluster:
        for number in range(12):
            generation = cluster.dispatcher.generate(
                request(f"c{number}.0", make_prompt(600, seed=number), max_tokens=200)
            )
            waiting = asyncio.ensure_future(anext(generation))
            await asyncio.wait((waiting,), timeout=0.004 * number)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await generation.aclose()
        await cluster.assert_clean()
        assert {record.outcome for record in cluster.ended} <= {"abort", "length"}
