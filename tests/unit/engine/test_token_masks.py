"""Grammars in the engine: outputs match them, however a request came to be where it is, and failures are one request's."""

from __future__ import annotations

import json
import math

import pytest
from helpers.engine_driver import Driver, make_request
from helpers.oracle import Subject, make_prompt
from helpers.tiny_models import EOS_TOKEN_ID
from tokenizers import Tokenizer

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, Request
from baton.services.core.scheduler.base import ScheduledRequest, StepResult
from baton.services.core.scheduler.finish import append_token
from baton.services.engine import grammar as grammar_module
from baton.services.engine.grammar import GrammarError

EOS = frozenset({EOS_TOKEN_ID})
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = json.dumps({"grammars": [{"json_schema": SCHEMA}]})
# Its answers end by themselves after 12 to 30 characters.
DIGITS = "start: /[0-9]{12,30}/"


def run(driver: Driver, requests: list[Request], chunk_size: int = 1 << 20) -> dict[str, BatonError]:
    """Computes all to their ends; those that failed, by their ids."""
    failed: dict[str, BatonError] = {}
    running = list(requests)
    while running:
        batch = [ScheduledRequest(r, min(chunk_size, r.num_uncomputed_tokens)) for r in running]
        for item in batch:
            driver.allocate(item.request, item.request.num_computed_tokens + item.num_tokens)
        result: StepResult = driver.engine.step(batch)
        failed |= result.failed
        for item in batch:
            item.request.num_computed_tokens += item.num_tokens
            token = result.sampled.get(item.request.request_id)
            if token is not None:
                driver.sampled.setdefault(item.request.request_id, []).append(token)
                item.request.finish_reason = append_token(item.request, token.token_id, 1000)
        running = [r for r in running if r.finish_reason is None and r.request_id not in failed]
    return failed


def constrained(prompt: tuple[int, ...], grammar: str = JSON, max_tokens: int = 120, **sampling: object) -> Request:
    return make_request(prompt, max_tokens=max_tokens, grammar=grammar, eos_token_ids=EOS, **sampling)


@pytest.fixture
def driver(llama: Subject) -> Driver:
    return Driver(llama.engine())


@pytest.fixture(scope="module")
def tokenizer(get_subject) -> Tokenizer:  # type: ignore[no-untyped-def]
    return Tokenizer.from_file(str(get_subject("llama").path / "tokenizer.json"))


def text_of(tokenizer: Tokenizer, request: Request) -> str:
    """The output without the end of sequence, which a finished grammar must end with."""
    output = request.token_ids[request.num_prompt_tokens :]
    assert (request.finish_reason, output[-1]) == (FinishReason.STOP, EOS_TOKEN_ID)
    return str(tokenizer.decode(output[:-1], skip_special_tokens=False))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.5, "top_k": 3, "seed": 9}])
def test_whatever_is_drawn_the_output_matches_the_schema(
    driver: Driver, tokenizer: Tokenizer, sampling: dict[str, object]
) -> None:
    request, free = constrained(make_prompt(20), max_tokens=400, **sampling), make_request(make_prompt(9))
    assert not run(driver, [free, request])
    answer = json.loads(text_of(tokenizer, request))
    assert answer.keys() == {"a", "b"}
    assert answer["b"] in ("x", "y")
    assert isinstance(answer["a"], int)


def test_a_grammar_beside_others_changes_nothing_for_them(llama: Subject) -> None:
    alone, beside = make_request(make_prompt(20)), make_request(make_prompt(20))
    run(Driver(llama.engine()), [alone])
    run(Driver(llama.engine()), [constrained(make_prompt(8), DIGITS), beside, constrained(make_prompt(5), JSON)])
    assert alone.token_ids == beside.token_ids


def test_the_state_follows_from_the_tokens_so_another_engine_goes_on_with_the_same_ones(llama: Subject) -> None:
    whole = constrained(make_prompt(30), DIGITS, temperature=1.0, seed=3)
    assert not run(Driver(llama.engine()), [whole])
    for kept in range(1, whole.num_output_tokens - 1, 4):
        resumed = constrained(make_prompt(30), DIGITS, temperature=1.0, seed=3)
        resumed.token_ids += whole.token_ids[30 : 30 + kept]
        assert not run(Driver(llama.engine()), [resumed], chunk_size=7)
        assert resumed.token_ids == whole.token_ids


def test_a_request_that_is_preempted_and_computed_anew_goes_on_in_its_grammar(driver: Driver, llama: Subject) -> None:
    undisturbed = constrained(make_prompt(12), DIGITS, temperature=1.0, seed=4)
    assert not run(Driver(llama.engine()), [undisturbed])
    request, other = (
        constrained(make_prompt(12), DIGITS, temperature=1.0, seed=4),
        make_request(make_prompt(6), max_tokens=3),
    )
    for _ in range(6):
        driver.step([(request, request.num_uncomputed_tokens)])
    request.block_table.clear()  # what the scheduler does to it
    request.num_computed_tokens = 0
    run(driver, [other])  # nobody remembers the first one now
    assert not run(driver, [request], chunk_size=5)
    assert request.token_ids == undisturbed.token_ids


def test_logprobs_are_of_the_model_not_of_the_mask(driver: Driver) -> None:
    request = constrained(make_prompt(20), DIGITS, num_logprobs=5)
    assert not run(driver, [request])
    tokens = driver.sampled[request.request_id]
    assert all(token.logprobs is not None and math.isfinite(token.logprobs.logprob) for token in tokens)
    assert all(token.logprobs.logprob > -9999 and len(token.logprobs.top) == 5 for token in tokens if token.logprobs)
    # What the model would rather have said is among the alternatives: they know nothing of the grammar.
    assert any(token.token_id not in dict(token.logprobs.top) for token in tokens if token.logprobs)


def test_a_finished_grammar_ends_the_request_also_before_min_tokens(driver: Driver, tokenizer: Tokenizer) -> None:
    request = constrained(make_prompt(20), 'start: "yes"', min_tokens=50)
    assert not run(driver, [request])
    assert text_of(tokenizer, request) == "yes"


def test_min_tokens_keep_a_grammar_going_that_could_end(driver: Driver) -> None:
    request = constrained(make_prompt(20), "start: /[0-9]{1,400}/", min_tokens=30, logit_bias=((EOS_TOKEN_ID, 100.0),))
    assert not run(driver, [request])
    assert request.num_output_tokens == 31  # the end is the first token that may be it


def test_penalties_and_biases_do_not_overrule_a_grammar(driver: Driver, tokenizer: Tokenizer) -> None:
    unwanted = tokenizer.token_to_id("7")
    request = constrained(
        make_prompt(20),
        "start: /7{10}/",
        repetition_penalty=1.5,
        logit_bias=((unwanted, -100.0),),
        presence_penalty=2.0,
    )
    assert not run(driver, [request])
    assert text_of(tokenizer, request) == "7" * 10


@pytest.mark.parametrize(
    "bad", ["start: (", "start: nowhere", "no grammar", '{"grammars": [{"json_schema": {"type": "foo"}}]}']
)
def test_a_grammar_that_does_not_compile_fails_its_request_alone(driver: Driver, bad: str) -> None:
    broken, good, free = constrained(make_prompt(9), bad), constrained(make_prompt(9)), make_request(make_prompt(9))
    failed = run(driver, [broken, good, free])
    assert failed.keys() == {broken.request_id}
    assert failed[broken.request_id].code is ErrorCode.INVALID_REQUEST
    assert not failed[broken.request_id].retryable
    assert (good.finish_reason, free.num_output_tokens) == (FinishReason.STOP, 24)


def test_tokens_that_do_not_fit_the_grammar_fail_their_request_alone(driver: Driver) -> None:
    request, free = constrained(make_prompt(9), DIGITS), make_request(make_prompt(9))
    request.token_ids += list(make_prompt(5, seed=7))
    assert run(driver, [request, free]).keys() == {request.request_id}


def test_a_model_without_an_end_of_sequence_cannot_follow_a_grammar(driver: Driver) -> None:
    request = make_request(make_prompt(9), grammar=DIGITS)
    error = run(driver, [request])[request.request_id]
    assert "end-of-sequence" in error.message


def test_who_meets_a_limit_that_others_used_up_goes_on_by_itself(
    llama: Subject, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The states of this lexer depend on the last ten letters: one answer makes about one for each token.
    monkeypatch.setattr(grammar_module, "MAX_LEXER_STATES", 150)
    hungry = "start: /((a|b)*a(a|b){10}c?){60}/"
    driver = Driver(llama.engine())
    compiled = []
    compile_one = driver.engine.grammars.compile
    monkeypatch.setattr(driver.engine.grammars, "compile", lambda *key: compiled.append(key) or compile_one(*key))
    for seed in range(6):
        request = constrained(make_prompt(9), hungry, max_tokens=60, temperature=2.0, seed=seed)
        assert not run(driver, [request])
        assert request.num_output_tokens == 60
    assert len(compiled) > 2  # the shared one was spoilt, and replaced


def test_a_grammar_that_needs_too_much_is_refused_in_words(driver: Driver) -> None:
    compiler = driver.engine.grammars
    with pytest.raises(GrammarError, match=r"fuel|too big|too large"):
        compiler.prepare("start: T\nT: /(.*a){10}/ & /(.*b){10}/ & ~/(.*c){10}/", EOS).result(30)
