"""Grammars through real workers: the same tokens wherever a request runs, and a failure that is one request's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import run_cluster
from helpers.oracle import Subject, make_prompt
from helpers.tiny_models import EOS_TOKEN_ID
from tokenizers import Tokenizer

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason

GetSubject = Callable[[str], Subject]
ROWS = {"type": "array", "minItems": 12, "maxItems": 12, "items": {"enum": [1, 22, 333]}}
GRAMMAR = "start: %json " + json.dumps(ROWS | {"x-guidance": {"whitespace_flexible": False}})
ENDS: dict[str, Any] = {"eos_token_ids": frozenset({EOS_TOKEN_ID}), "max_tokens": 100}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 11}], ids=["greedy", "drawn"])
async def test_a_handoff_changes_no_token_and_the_first_one_is_constrained_as_well(
    get_subject: GetSubject, key_file: Path, sampling: dict[str, Any]
) -> None:
    subject = get_subject("llama")
    prompts = [make_prompt(length, seed=3) for length in (5, 16, 40)]
    answers = []
    for mode in ("colocated", "disaggregated"):
        async with run_cluster(subject.loaded, key_file, mode=mode) as cluster:
            answers.append(await cluster.generate_all(prompts, grammar=GRAMMAR, **ENDS, **sampling))
            await cluster.assert_clean()
    tokenizer = Tokenizer.from_file(str(subject.path / "tokenizer.json"))
    for here, there in zip(*answers, strict=True):
        assert here.token_ids == there.token_ids
        assert (here.finish_reason, here.token_ids[-1]) == (FinishReason.STOP, EOS_TOKEN_ID)
        assert len(json.loads(tokenizer.decode(here.token_ids[:-1]))) == 12


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
async def test_a_grammar_that_fails_on_a_worker_ends_its_request_alone(
    get_subject: GetSubject, key_file: Path, mode: str
) -> None:
    subject = get_subject("llama")
    async with run_cluster(subject.loaded, key_file, mode=mode) as cluster:
        beside = asyncio.create_task(cluster.generate(make_prompt(20), max_tokens=60))
        for bad in ("start: (", "start: /(/", '{"grammars": [{"json_schema": {"type": "foo"}}]}'):
            with pytest.raises(BatonError) as error:
                await cluster.generate(make_prompt(9), grammar=bad, **ENDS)
            assert error.value.code is ErrorCode.INVALID_REQUEST
            assert error.value.message
        assert len((await beside).token_ids) == 60
        assert all(record.attempts and len(record.attempts) == 1 for record in cluster.ended)  # nobody tried again
        await cluster.assert_clean()
