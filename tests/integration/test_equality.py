"""The floor: the tokens are transformers' own, through every path that a request can take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.cluster import Cluster, Generated, run_cluster
from helpers.oracle import Subject, expected_tokens, make_prompt
from helpers.tiny_models import FAMILIES
from helpers.whole_answers import PATIENT, whole_costs

from baton.services.core.request import FinishReason
from baton.services.core.router import Placement

PROMPT_LENGTHS = (1, 15, 16, 17, 130, 700)
# 16 at once: all lengths, most of them more than once.
CONCURRENT = tuple(make_prompt(length, seed) for seed, length in enumerate((*PROMPT_LENGTHS[:5] * 3, 700), start=1))
MODES = {
    "colocated": ("colocated", "auto"),
    "shm": ("disaggregated", "shm"),
    "tcp": ("disaggregated", "tcp"),
    "whole": ("disaggregated", "auto"),  # the prefill worker answers
    # On a GPU all modes compute there; between two caches of it blocks can go without the host.
    **({"cuda_ipc": ("disaggregated", "cuda_ipc")} if torch.cuda.is_available() else {}),
}


def check(generated: Generated, subject: Subject, prompt: tuple[int, ...], *, is_cached: bool) -> None:
    assert generated.token_ids == expected_tokens(subject, prompt), f"prompt of {len(prompt)} tokens"
    assert generated.indices == list(range(24))
    assert generated.finish_reason is FinishReason.LENGTH
    assert generated.cached_tokens == (((len(prompt) - 1) // 16) * 16 if is_cached else 0)


def check_receipt(cluster: Cluster, generated: Generated, mode: str) -> None:
    receipt = cluster.receipts.get(generated.receipt_id)
    assert receipt is not None
    assert receipt["outcome"] == "length"
    is_alone = mode in ("colocated", "whole")
    assert receipt["decision"]["mode"] == ("colocated" if is_alone else "remote")  # type: ignore[index]
    if mode == "whole":
        assert receipt["decision"]["decode"] == "prefill-0"  # type: ignore[index]
    assert sum(receipt["phases_ms"].values()) == pytest.approx(receipt["ttft_ms"], abs=1.0)  # type: ignore[attr-defined]
    if is_alone:
        assert receipt["transfer"] is None
    else:
        assert receipt["transfer"]["path"] == mode  # type: ignore[index]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
async def test_tokens_equal_transformers(
    family: str, mode: str, get_subject: Callable[[str], Subject], key_file: Path
) -> None:
    """Alone and 16 at once, from nothing and from the prefix cache; the blocks are equal byte for byte on both workers."""
    subject = get_subject(family)
    topology, transport = MODES[mode]
    alone = [make_prompt(length) for length in PROMPT_LENGTHS]
    whole = {"placement": Placement.AUTO, "costs": whole_costs(), "slo": PATIENT} if mode == "whole" else {}
    # 256 tokens a step: the longest prompt takes three, so that blocks travel while later chunks compute.
    async with run_cluster(
        subject.loaded,
        key_file,
        mode=topology,
        transport=transport,
        max_num_batched_tokens=256,
        num_blocks=400,
        **whole,
    ) as cluster:
        for is_cached in (False, True):
            for prompt in alone:
                generated = await cluster.generate(prompt, ignore_eos=True)
                check(generated, subject, prompt, is_cached=is_cached)
                check_receipt(cluster, generated, mode)
        for is_cached in (False, True):
            for prompt, generated in zip(
                CONCURRENT, await cluster.generate_all(CONCURRENT, ignore_eos=True), strict=True
            ):
                check(generated, subject, prompt, is_cached=is_cached)
        if topology == "disaggregated" and mode != "whole":
            for prompt in (*alone, *CONCURRENT):
                sent = await cluster.block_bytes("prefill", prompt)
                assert len(sent) == len(prompt) // 16
                assert await cluster.block_bytes("decode", prompt) == sent
        await cluster.assert_clean()
