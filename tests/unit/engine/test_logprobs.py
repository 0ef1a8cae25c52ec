"""Logprobs are those of the unmodified distribution, for generated and prompt tokens."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.engine_driver import Driver, make_request
from helpers.oracle import Subject, make_prompt

from baton.services.core.request import TokenLogprobs
from baton.services.engine.logprobs import MIN_LOGPROB, compute_logprobs


def reference_logprobs(subject: Subject, token_ids: list[int]) -> torch.Tensor:
    """Row i: the distribution of token i + 1."""
    with torch.no_grad():
        logits = subject.reference(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def check(entry: TokenLogprobs | None, expected: torch.Tensor, token_id: int, num_top: int) -> None:
    assert entry is not None
    assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
    values, ids = expected.topk(num_top)
    assert [token for token, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_generated_tokens(llama: Subject, num_top: int) -> None:
    """Before temperature, penalties, bias: what is drawn from does not show."""
    request = make_request(
        make_prompt(17),
        max_tokens=8,
        num_logprobs=num_top,
        temperature=1.7,
        seed=1,
        presence_penalty=1.5,
        logit_bias=((9, 5.0),),
    )
    plain = make_request(make_prompt(16), max_tokens=8)
    driver = Driver(llama.engine())
    driver.run([plain, request])
    expected = reference_logprobs(llama, request.token_ids)
    tokens = driver.sampled[request.request_id]
    for index, token in enumerate(tokens):
        check(token.logprobs, expected[16 + index], token.token_id, num_top)
    assert all(token.logprobs is None for token in driver.sampled[plain.request_id])


@pytest.mark.parametrize("length", [1, 2, 17, 130])
@pytest.mark.parametrize("chunk_size", [1, 16, 1000])
def test_prompt_tokens(llama: Subject, length: int, chunk_size: int) -> None:
    """One entry per prompt token, the first of them None, whatever the chunks; beside a request that wants none."""
    request = make_request(make_prompt(length), max_tokens=3, num_prompt_logprobs=2)
    other = make_request(make_prompt(40), max_tokens=3)
    driver = Driver(llama.engine())
    driver.run([other, request], chunk_size)
    entries = driver.prompt_logprobs[request.request_id]
    assert len(entries) == length
    assert entries[0] is None
    expected = reference_logprobs(llama, request.token_ids)
    for position in range(1, length):
        check(entries[position], expected[position - 1], request.token_ids[position], 2)
    assert driver.prompt_logprobs[other.request_id] == []
    alone = make_request(make_prompt(length), max_tokens=3)
    driver.run([alone])
    assert driver.output(request) == driver.output(alone)


def test_prompt_logprobs_are_not_given_again_after_a_preemption(llama: Subject) -> None:
    request = make_request(make_prompt(17), max_tokens=4, num_prompt_logprobs=0)
    driver = Driver(llama.engine())
    driver.step([(request, 17)])
    request.block_table, request.num_computed_tokens = [], 0
    driver.run([request])
    assert len(driver.prompt_logprobs[request.request_id]) == 17


def test_minus_infinity_and_nan_are_finite() -> None:
    """JSON has neither."""
    logits = torch.tensor([[0.0, -math.inf, 0.0], [math.nan, 0.0, 0.0]])
    first, second = compute_logprobs(logits, torch.tensor([1, 0]), [3, 1])
    assert first.logprob == MIN_LOGPROB
    assert [value for _, value in first.top] == pytest.approx([math.log(0.5), math.log(0.5), MIN_LOGPROB])
    assert second == TokenLogprobs(MIN_LOGPROB, ((second.top[0][0], MIN_LOGPROB),))


def test_more_alternatives_than_tokens() -> None:
    (entry,) = compute_logprobs(torch.zeros((1, 4)), torch.tensor([2]), [20])
    assert sorted(token for token, _ in entry.top) == [0, 1, 2, 3]


def test_sixteen_bit_logits_are_widened_first() -> None:
    logits = torch.tensor([[10.0, 9.0, -3.0]], dtype=torch.bfloat16)
    (entry,) = compute_logprobs(logits, torch.tensor([1]), [0])
    assert entry.logprob == pytest.approx(torch.log_softmax(logits.float(), -1)[0, 1].item(), abs=1e-6)
