"""Choosing tokens: adjustments against transformers' processors, and a choice that depends on nothing but its own row."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers.engine_driver import Driver, make_request
from helpers.oracle import Subject, make_prompt

from baton.services.core.request import Request
from baton.services.engine.penalties import LogitAdjuster
from baton.services.engine.sampler import Sampler

VOCAB = 50
PROMPT = [3, 4, 4, 5]
OUTPUT = [5, 6, 6, 6, 7]


def make_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed))


def request_with(output: list[int], **sampling: object) -> Request:
    return make_request(PROMPT + output, num_prompt_tokens=len(PROMPT), **sampling)


def adjusted(logits: torch.Tensor, *requests: Request) -> torch.Tensor:
    result = logits.clone()
    LogitAdjuster().apply(result, requests)
    return result


def choose(logits: torch.Tensor, *requests: Request) -> list[int]:
    return [token.token_id for token in Sampler().sample(logits, list(requests))]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Over prompt and output; positive logits are divided, negative ones multiplied."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = make_logits(1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    torch.testing.assert_close(adjusted(logits, request_with(OUTPUT, repetition_penalty=penalty)), expected)


def test_presence_and_frequency_penalties_are_over_the_output() -> None:
    logits = make_logits(1)
    expected = logits.clone()
    for token_id, count in Counter(OUTPUT).items():
        expected[0, token_id] -= 0.5 + 0.25 * count
    request = request_with(OUTPUT, presence_penalty=0.5, frequency_penalty=0.25)
    torch.testing.assert_close(adjusted(logits, request), expected)


def test_penalties_come_before_the_bias_and_the_ban_last() -> None:
    logits = torch.full((1, VOCAB), 2.0)
    request = request_with(
        OUTPUT,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        logit_bias=((6, 3.0), (9, 100.0)),
        min_tokens=len(OUTPUT) + 1,
        stop_token_ids=frozenset({9}),
    )
    result = adjusted(logits, request)[0]
    assert result[6] == 2.0 / 2.0 - 0.5 + 3.0
    assert result[3] == 1.0  # in the prompt only
    assert result[8] == 2.0  # nowhere
    assert result[9] == -torch.inf


def test_rows_that_ask_for_nothing_are_untouched() -> None:
    logits = make_logits(3)
    result = adjusted(logits, request_with(OUTPUT), request_with(OUTPUT, presence_penalty=1.0), request_with([]))
    assert torch.equal(result[0], logits[0])
    assert not torch.equal(result[1], logits[1])
    assert torch.equal(result[2], logits[2])


@pytest.mark.parametrize(
    ("num_output", "ignore_eos", "chosen"),
    [(2, False, 7), (3, False, 2), (0, True, 2), (2, True, 2)],
)
def test_min_tokens_bans_what_would_end_the_generation(num_output: int, ignore_eos: bool, chosen: int) -> None:
    """End-of-sequence first; next stop token 9; then 7. With ignore_eos only the stop token ends anything."""
    logits = torch.zeros((1, VOCAB))
    logits[0, [2, 9, 7]] = torch.tensor([5.0, 4.0, 3.0])
    request = request_with(
        [4] * num_output,
        min_tokens=3,
        eos_token_ids=frozenset({2}),
        stop_token_ids=frozenset({9}),
        ignore_eos=ignore_eos,
    )
    assert choose(logits, request) == [chosen]


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    """They must not fail the other requests of the batch."""
    logits = make_logits(1)
    request = request_with([], logit_bias=((VOCAB, 9.0), (-1, 9.0)), min_tokens=2, stop_token_ids=frozenset({10**6}))
    assert torch.equal(adjusted(logits, request), logits)


def test_counts_kept_from_step_to_step_equal_a_replay() -> None:
    """With requests coming and going, and one that was away for a while."""
    rng = random.Random(0)
    requests = [request_with([], presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=1.2) for _ in range(4)]
    kept = LogitAdjuster()
    for step in range(60):
        batch = rng.sample(requests, rng.randint(1, 4))
        logits = make_logits(len(batch), step)
        result = logits.clone()
        kept.apply(result, batch)
        assert torch.equal(result, adjusted(logits, *batch))
        for request in batch:
            request.token_ids += [rng.randrange(VOCAB) for _ in range(rng.randint(1, 3))]


def test_logits_are_not_changed() -> None:
    logits = make_logits(2)
    before = logits.clone()
    choose(logits, request_with(OUTPUT, presence_penalty=2.0), request_with(OUTPUT, temperature=1.0, top_p=0.5))
    assert torch.equal(logits, before)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros((2, VOCAB))
    logits[:, [11, 30]] = 1.0
    assert choose(logits, request_with([]), request_with([], logit_bias=((30, 0.0),))) == [11, 11]


def test_a_choice_depends_on_its_own_row_only() -> None:
    """Each row alone, and in batches of any company and order, one sampler after many batches or a new one."""
    rng = random.Random(1)
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"frequency_penalty": 1.0},
        {"temperature": 1.0, "logit_bias": ((7, 4.0),), "min_tokens": 99, "eos_token_ids": frozenset({8})},
        {"temperature": 1.0, "num_logprobs": 2},
    ]
    requests = [request_with(OUTPUT[: i % 5], seed=2**63 + i, **kinds[i % len(kinds)]) for i in range(24)]
    logits = make_logits(len(requests))
    alone = [choose(logits[i : i + 1], request)[0] for i, request in enumerate(requests)]
    assert len(set(alone)) > 10
    sampler = Sampler()
    for _ in range(40):
        batch = rng.sample(range(len(requests)), rng.randint(1, len(requests)))
        for _ in range(rng.randint(1, 2)):  # the same batch again takes the remembered parameters
            tokens = sampler.sample(logits[batch], [requests[i] for i in batch])
            assert [token.token_id for token in tokens] == [alone[i] for i in batch]


def test_draws_change_with_seed_and_position() -> None:
    logits = torch.zeros((1, VOCAB))
    by_seed = [choose(logits, request_with([], temperature=1.0, seed=seed))[0] for seed in range(40)]
    by_position = [choose(logits, request_with([4] * n, temperature=1.0, seed=3))[0] for n in range(40)]
    assert len(set(by_seed)) > 15
    assert len(set(by_position)) > 15


def test_position_is_the_index_in_the_whole_sequence() -> None:
    """A continuation elsewhere may take what was generated so far for its prompt: it draws the same."""
    logits = torch.zeros((1, VOCAB))
    for seed in range(10):
        generated = request_with(OUTPUT, temperature=1.0, seed=seed)
        given = make_request(PROMPT + OUTPUT, temperature=1.0, seed=seed)
        assert choose(logits, generated) == choose(logits, given)


# --- through the engine

SAMPLED: dict[str, object] = {"temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.3}


def seeded(subject: Subject, seeds: list[int]) -> list[list[int]]:
    driver = Driver(subject.engine())
    requests = [make_request(make_prompt(20, seed), max_tokens=16, seed=seed, **SAMPLED) for seed in seeds]
    driver.run(requests)
    return [driver.output(request) for request in requests]


def test_seeded_requests_alone_and_in_a_batch(llama: Subject) -> None:
    seeds = list(range(8))
    together = seeded(llama, seeds)
    assert together == [seeded(llama, [seed])[0] for seed in seeds]
    assert len({tuple(output) for output in together}) == len(seeds)


@pytest.mark.parametrize("copies_blocks", [False, True])
def test_seeded_request_split_across_two_engines(llama: Subject, copies_blocks: bool) -> None:
    """A continuation elsewhere, from the tokens alone or with the blocks, draws what would have been drawn here."""
    whole = seeded(llama, [5])[0]
    first = Driver(llama.engine())
    request = make_request(make_prompt(20, 5), max_tokens=16, seed=5, **SAMPLED)
    while request.num_output_tokens < 7:
        first.step([(request, request.num_uncomputed_tokens)])

    second = Driver(llama.engine())
    continued = make_request(request.token_ids, num_prompt_tokens=20, max_tokens=16, seed=5, **SAMPLED)
    if copies_blocks:
        second.allocate(continued, request.num_computed_tokens)
        second.engine.kv_cache[continued.block_table] = first.engine.kv_cache[request.block_table]
        continued.num_computed_tokens = request.num_computed_tokens
    second.run([continued])
    assert second.output(continued) == whole


@pytest.fixture(params=["llama", "gpt2"])
def subject(request: pytest.FixtureRequest, get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject(request.param)


def test_min_tokens_and_penalties_equal_transformers_generate(subject: Subject) -> None:
    """The whole way, with its own processors: minimum new tokens, repetition penalty, end of sequence wanted badly."""
    from transformers import GenerationConfig

    prompt = make_prompt(15)
    eos = 40
    config = GenerationConfig(
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.4,
        sequence_bias=[[[eos], 50.0]],
        eos_token_id=eos,
        pad_token_id=0,
    )
    ids = torch.tensor([prompt])
    expected = subject.reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    driver = Driver(subject.engine())
    request = make_request(
        prompt,
        max_tokens=12,
        min_tokens=12,
        repetition_penalty=1.4,
        logit_bias=((eos, 50.0),),
        eos_token_ids=frozenset({eos}),
    )
    driver.run([request])
    assert driver.output(request) == expected[0, 15:].tolist()
