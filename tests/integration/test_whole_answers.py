"""Answers that prefill workers give whole: the same tokens as in every other way, also when their worker is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from helpers.cluster import Cluster, run_cluster
from helpers.oracle import Subject, expected_tokens, make_prompt, make_subject
from helpers.serving import serving
from helpers.streams import PATIENCE_S, Stream
from helpers.waiting import eventually_sync
from helpers.whole_answers import PATIENT, whole_costs, write_profile

from baton.services.core.fetch import FetchMode, FetchPolicy
from baton.services.core.router import Placement

SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.2, "frequency_penalty": 0.2}
NUMBERS = 'start: %json {"type": "array", "minItems": 3, "maxItems": 3, "items": {"enum": [1, 22, 333]}}'


def modes(cluster: Cluster) -> set[str]:
    """Whose answers the cluster's requests got so far."""
    return {record.attempts[-1].decision.chosen.decode.worker_id for record in cluster.ended}


async def test_seeds_penalties_logprobs_and_minimal_lengths_say_the_same_as_after_a_handoff(
    get_subject: Callable[[str], Subject], key_file: Path
) -> None:
    loaded = get_subject("qwen3").loaded
    kinds: list[dict[str, Any]] = [
        SEEDED,
        {"num_logprobs": 3},
        {"num_prompt_logprobs": 1, "num_logprobs": 0},
        {"min_tokens": 10, "stop_token_ids": frozenset(range(400))},
    ]
    prompt = make_prompt(70, 3)

    async def answers(**how: Any) -> tuple[list[Any], set[str]]:
        async with run_cluster(loaded, key_file, max_num_batched_tokens=48, num_blocks=200, **how) as cluster:
            generated = [await cluster.generate(prompt, **kind) for kind in (*kinds, *kinds)]
            await cluster.assert_clean()
            return [(one.tokens, one.finish_reason, one.indices) for one in generated], modes(cluster)

    handed_over, by_decode = await answers()
    whole, by_prefill = await answers(placement=Placement.AUTO, costs=whole_costs(), slo=PATIENT)
    assert (by_decode, by_prefill) == ({"decode-1"}, {"prefill-0"})
    for one, other in zip(handed_over, whole, strict=True):
        assert [token.token_id for token in one[0]] == [token.token_id for token in other[0]]
        assert one[1:] == other[1:]
        for left, right in zip(one[0], other[0], strict=True):
            assert (left.logprobs is None) == (right.logprobs is None)
            if left.logprobs is not None and right.logprobs is not None:
                assert left.logprobs.logprob == pytest.approx(right.logprobs.logprob, abs=1e-3)


async def test_blocks_that_another_worker_holds_are_fetched_first(
    get_subject: Callable[[str], Subject], key_file: Path
) -> None:
    subject, prompt = get_subject("qwen3"), make_prompt(130, 4)
    fetch = FetchPolicy(FetchMode.ALWAYS)
    how: dict[str, Any] = {"placement": Placement.AUTO, "costs": whole_costs(), "slo": PATIENT, "fetch": fetch}
    async with run_cluster(subject.loaded, key_file, num_prefill=2, num_blocks=200, **how) as cluster:
        first = await cluster.generate(prompt, ignore_eos=True)
        holder = cluster.ended[0].attempts[0].decision.chosen.decode
        (other,) = {"prefill-0", "prefill-1"} - {holder.worker_id}
        # The next one goes to the other worker: this one is full, as far as the gateway has been told.
        status = await next(host for host in cluster.hosts if host.identity.worker_id == holder.worker_id).status()
        status.answering = status.max_num_seqs
        cluster.registry.heard(status)
        second = await cluster.generate(prompt, ignore_eos=True)
        record = cluster.ended[1]
        assert record.attempts[0].decision.chosen.decode.worker_id == other
        assert record.fetch is not None
        assert record.fetch.num_blocks == 8
        assert second.cached_tokens == 128
        assert first.token_ids == second.token_ids == expected_tokens(subject, prompt)
        await cluster.assert_clean()


def test_a_prefill_worker_that_is_killed_under_its_answers_changes_no_token(tmp_path: Path) -> None:
    """Real processes. Greedy, seeded and under a grammar, streamed."""
    subject = make_subject("qwen3", tmp_path / "model")
    options = ("--model", str(subject.path), "--kv-cache-memory", "32MiB", "--dtype", "float32")
    options += (
        "--served-model-name",
        "tiny",
        "--placement",
        "auto",
        "--profile",
        str(write_profile(tmp_path / "profile")),
    )
    options += ("--replace-unresponsive-after-s", "0", "--failpoints", "decode.step_n=delay(5)")
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "seeded": SEEDED,
        "grammar": {"temperature": 0, "structured_outputs": {"grammar": NUMBERS}, "ignore_eos": False},
    }
    with serving(*options, "--prefill", "2", "--decode", "1") as server:
        server.wait_for_workers(3)
        bodies = {
            kind: {
                "model": "tiny",
                "prompt": list(make_prompt(40, seed=9)),
                "max_tokens": 150,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
                "slo": {"ttft_ms": 1e5, "tpot_ms": 1e3},
                **parameters,
            }
            for kind, parameters in kinds.items()
        }
        prefill = {w["id"]: psutil.Process(w["pid"]) for w in server.workers() if w["role"] == "prefill"}
        streams = {kind: [Stream(server, body) for _ in range(2)] for kind, body in bodies.items()}
        greedy = streams["greedy"][0]
        greedy.wait_for(5)
        for process in prefill.values():  # so that it is still in the middle when it is known where it is
            process.suspend()
        serving_worker = prefill.pop(greedy.receipt["attempts"][0]["decode"])
        assert greedy.finish_reason is None
        serving_worker.kill()
        for process in prefill.values():
            process.resume()
        for some in streams.values():
            for stream in some:
                stream.finish()
        assert greedy.receipt["retries"] >= 1
        assert greedy.receipt["attempts"][0]["mode"] == "colocated"
        assert greedy.tokens[:24] == expected_tokens(subject, make_prompt(40, seed=9))
        for kind, (one, other) in streams.items():
            undisturbed = Stream(server, bodies[kind]).finish()
            assert one.tokens == other.tokens == undisturbed.tokens, kind
            assert one.text == other.text == undisturbed.text, kind
        assert streams["grammar"][0].text.startswith("[")
        assert streams["grammar"][0].finish_reason == "stop"
        eventually_sync(lambda: len(server.workers()) == 3, timeout_s=PATIENCE_S, what="the replacement")
        server.assert_clean(PATIENCE_S)
        assert httpx.get(f"{server.url}/ready").status_code == 200
