"""Greedy tokens in float32 equal those of transformers' ``generate``, however a request is batched, chunked or cached."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.engine_driver import Driver, make_request
from helpers.oracle import NUM_OUTPUT_TOKENS, Subject, expected_tokens, make_prompt
from helpers.tiny_models import FAMILIES

LENGTHS = (1, 15, 16, 17, 130)


@pytest.fixture(scope="module", params=list(FAMILIES))
def subject(request: pytest.FixtureRequest, get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject(request.param)


def run(subject: Subject, prompts: list[tuple[int, ...]], chunk_size: int = 1 << 20) -> list[list[int]]:
    driver = Driver(subject.engine())
    requests = [make_request(prompt, max_tokens=NUM_OUTPUT_TOKENS) for prompt in prompts]
    driver.run(requests, chunk_size)
    return [driver.output(request) for request in requests]


@pytest.mark.parametrize("length", [*LENGTHS, 700])
def test_alone(subject: Subject, length: int) -> None:
    prompt = make_prompt(length)
    assert run(subject, [prompt]) == [expected_tokens(subject, prompt)]


def test_sixteen_of_mixed_lengths_together(subject: Subject) -> None:
    prompts = [make_prompt(length, seed) for seed in range(3) for length in LENGTHS] + [make_prompt(33)]
    assert run(subject, prompts) == [expected_tokens(subject, prompt) for prompt in prompts]


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64])
def test_prompt_computed_in_chunks(subject: Subject, chunk_size: int) -> None:
    prompts = [make_prompt(length) for length in LENGTHS]
    assert run(subject, prompts, chunk_size) == [expected_tokens(subject, prompt) for prompt in prompts]


def test_prefills_join_running_decodes(subject: Subject) -> None:
    """Every few steps another prompt arrives, so that steps hold decodes and chunks at once."""
    prompts = [make_prompt(length) for length in LENGTHS]
    driver = Driver(subject.engine())
    requests = [make_request(prompt, max_tokens=NUM_OUTPUT_TOKENS) for prompt in prompts]
    for step in range(2 * NUM_OUTPUT_TOKENS + 20):
        arrived = requests[: step // 4 + 1]
        running = [r for r in arrived if r.num_output_tokens < NUM_OUTPUT_TOKENS]
        driver.step((r, min(40, r.num_uncomputed_tokens)) for r in running)
    assert [driver.output(r) for r in requests] == [expected_tokens(subject, prompt) for prompt in prompts]


@pytest.mark.parametrize("num_cached_blocks", [1, 8])
def test_prefix_from_another_requests_blocks(subject: Subject, num_cached_blocks: int) -> None:
    """A block table may begin with blocks that somebody else computed, full ones up to all but the last token."""
    prompt = make_prompt(130)
    driver = Driver(subject.engine())
    first, second = (make_request(prompt, max_tokens=NUM_OUTPUT_TOKENS) for _ in range(2))
    driver.run([first])
    second.block_table = first.block_table[:num_cached_blocks]
    second.num_computed_tokens = 16 * num_cached_blocks
    driver.run([second])
    assert driver.output(second) == driver.output(first) == expected_tokens(subject, prompt)


def test_computed_again_after_a_preemption(subject: Subject) -> None:
    """Prompt and output tokens are the same thing: all of them are computed again, into other blocks."""
    prompt = make_prompt(17)
    driver = Driver(subject.engine())
    request = make_request(prompt, max_tokens=NUM_OUTPUT_TOKENS)
    while request.num_output_tokens < 10:
        driver.step([(request, request.num_uncomputed_tokens)])
    request.block_table, request.num_computed_tokens = [], 0
    driver.run([request])
    assert driver.output(request) == expected_tokens(subject, prompt)
