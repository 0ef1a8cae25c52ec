"""Workers of this release and of the one before it serve together, whichever is upgraded first, and still when all are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import Cluster, run_cluster
from helpers.oracle import Subject, expected_tokens, make_prompt

from baton.kvtransfer.versions import WIRE_VERSIONS
from baton.services.worker import host as worker_host

OLD = WIRE_VERSIONS.newest - 1


@pytest.fixture
def subject(get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject("qwen3")


@pytest.mark.parametrize("old_role", ["prefill", "decode"])
async def test_a_pool_half_upgraded_serves_the_same_tokens(
    subject: Subject, key_file: Path, monkeypatch: pytest.MonkeyPatch, old_role: str
) -> None:
    """Two prefill workers, one decode worker; the first of one role speaks the older version of the wire."""
    original, pinned = worker_host.make_transfer_options, set()

    def options(settings: Any, budget: Any) -> Any:
        if settings.role == old_role and not pinned:
            pinned.add(settings.worker_id)
            return replace(original(settings, budget), newest_wire_version=OLD)
        return original(settings, budget)

    monkeypatch.setattr(worker_host, "make_transfer_options", options)
    async with run_cluster(subject.loaded, key_file, num_prefill=2) as cluster:
        prompts = [make_prompt(40 + 3 * number, seed=number) for number in range(6)]
        answers = await cluster.generate_all(prompts, max_tokens=8, ignore_eos=True)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == expected_tokens(subject, prompt)[:8]
        records = [cluster.receipts.get(answer.receipt_id) for answer in answers]
        assert {record["decision"]["mode"] for record in records if record} == {"remote"}
        assert len({record["decision"]["prefill"] for record in records if record}) == 2
        assert spoken(cluster) == ({OLD, WIRE_VERSIONS.newest} if old_role == "prefill" else {OLD})
        await cluster.assert_clean()


def spoken(cluster: Cluster) -> set[int]:
    """What the pairs agreed on, as the decode worker has it."""
    receiving = cluster.host("decode")._agent._receiving
    return {pair.version for pair in receiving._pairs.values()}
