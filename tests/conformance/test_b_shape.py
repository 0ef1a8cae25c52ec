"""B. The shape of answers that are not streamed, and what their figures mean."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import Any

import pytest
from helpers.api_client import CHAT, COMPLETIONS, MESSAGES, PROMPT, Api

STORY = "One day the fox went out to look for the old key of the house"
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter", "abort", "error", "repetition"}
BLOCK = 16


def check_envelope(api: Api, answer: dict[str, Any], prefix: str, object_name: str) -> None:
    assert answer["id"].startswith(prefix)
    assert answer["object"] == object_name
    assert type(answer["created"]) is int
    assert answer["created"] > 1_600_000_000
    assert answer["model"] == api.model
    usage = answer["usage"]
    assert usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def cached(answer: dict[str, Any]) -> int:
    details = answer["usage"].get("prompt_tokens_details")
    if details is None:
        pytest.skip("the server does not tell cached tokens")
    return int(details["cached_tokens"])


def test_b036_a_chat_answer(api: Api) -> None:
    answer = api.chat()
    check_envelope(api, answer, "chatcmpl-", "chat.completion")
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert not choice["message"].get("tool_calls")
    assert choice["logprobs"] is None
    assert choice["finish_reason"] in FINISH_REASONS


def test_b037_a_text_completion(api: Api) -> None:
    answer = api.complete()
    check_envelope(api, answer, "cmpl-", "text_completion")
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert isinstance(choice["text"], str)
    assert choice["logprobs"] is None
    assert choice["finish_reason"] in FINISH_REASONS


def test_b038_finish_reasons(api: Api) -> None:
    assert api.complete(prompt=STORY, ignore_eos=True, max_tokens=3)["choices"][0]["finish_reason"] == "length"
    text = api.complete(prompt=STORY, ignore_eos=True, max_tokens=12)["choices"][0]["text"]
    stopped = api.complete(prompt=STORY, ignore_eos=True, max_tokens=12, stop=text[2:5])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    ended = api.chat(max_tokens=200)["choices"][0]
    assert ended["finish_reason"] == "stop", "the model does not end its answer: choose another"


def test_b039_stop_reasons(api: Api) -> None:
    assert api.chat(max_tokens=200)["choices"][0]["stop_reason"] is None
    whole = api.complete(prompt=STORY, ignore_eos=True, return_token_ids=True)["choices"][0]
    stop = whole["text"][2:5]
    assert api.complete(prompt=STORY, ignore_eos=True, stop=stop)["choices"][0]["stop_reason"] == stop
    token = whole["token_ids"][3]
    assert api.complete(prompt=STORY, ignore_eos=True, stop_token_ids=[token])["choices"][0]["stop_reason"] == token


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_b040_exactly_max_tokens(api: Api, max_tokens: int) -> None:
    for path in (CHAT, COMPLETIONS):
        answer = api.ask(path, max_tokens=max_tokens, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == max_tokens
        assert answer["choices"][0]["finish_reason"] == "length"


def test_b041_prompts_times_choices(api: Api) -> None:
    prompts = [STORY, "The key for copper gate is", "A list of"]
    answer = api.complete(prompt=prompts, n=2, temperature=0.8, seed=3, max_tokens=6, ignore_eos=True)
    assert sorted(choice["index"] for choice in answer["choices"]) == list(range(6))
    alone = [api.complete(prompt=prompt, max_tokens=1)["usage"]["prompt_tokens"] for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(alone)
    assert answer["usage"]["completion_tokens"] == 6 * 6
    greedy = {choice["index"]: choice["text"] for choice in api.complete(prompt=prompts, ignore_eos=True)["choices"]}
    for number, prompt in enumerate(prompts):
        assert greedy[number] == api.complete(prompt=prompt, ignore_eos=True)["choices"][0]["text"]


def test_b042_choices_share_one_prompts_usage(api: Api) -> None:
    one, three = (api.chat(n=n, temperature=0.9, seed=1, max_tokens=5, ignore_eos=True)["usage"] for n in (1, 3))
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"] == 15


def test_b043_echo_begins_with_the_prompt(api: Api) -> None:
    plain = api.complete(prompt=STORY)["choices"][0]["text"]
    assert api.complete(prompt=STORY, echo=True)["choices"][0]["text"] == STORY + plain
    token_ids = api.tokenize(STORY)
    assert api.complete(prompt=token_ids, echo=True)["choices"][0]["text"].startswith(STORY)


def test_b044_defaults(api: Api) -> None:
    assert api.complete(prompt=STORY, max_tokens=..., ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert api.chat(max_tokens=..., min_tokens=20)["usage"]["completion_tokens"] >= 20
    sampled = api.complete(prompt=STORY, temperature=..., n=4, max_tokens=24, ignore_eos=True)["choices"]
    assert len({choice["text"] for choice in sampled}) > 1, "the default temperature is 0"


def test_b045_token_ids_answer_like_their_text(api: Api) -> None:
    response = api.post("/tokenize", {"model": api.model, "prompt": STORY})
    if response.status_code == 404:
        pytest.skip("the server has no /tokenize")
    token_ids = response.json()["tokens"]
    by_text, by_ids = api.complete(prompt=STORY), api.complete(prompt=token_ids)
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"]
    assert by_ids["usage"]["prompt_tokens"] == by_text["usage"]["prompt_tokens"] == len(token_ids)


def test_b046_text_equals_one_text_part(api: Api) -> None:
    part = {"role": "user", "content": [{"type": "text", "text": PROMPT}]}
    plain, parts = api.chat(), api.chat(messages=[part])
    assert parts["choices"] == plain["choices"]
    assert parts["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_b047_greedy_repeats(api: Api) -> None:
    texts = {api.complete(prompt=STORY, max_tokens=24, ignore_eos=True)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1


def test_b048_seeds(api: Api) -> None:
    def ask(seed: int, n: int = 1) -> list[str]:
        answer = api.complete(prompt=STORY, seed=seed, n=n, temperature=1.2, max_tokens=24, ignore_eos=True)
        return [choice["text"] for choice in answer["choices"]]

    assert ask(11) == ask(11)
    assert len({ask(seed)[0] for seed in (11, 12, 13)}) > 1
    several = ask(11, n=3)
    assert len(set(several)) > 1
    assert several == ask(11, n=3)


def test_b049_cached_tokens(api: Api) -> None:
    def ask(salt: str, **fields: Any) -> dict[str, Any]:
        return api.complete(prompt=f"{STORY}. " * 8, cache_salt=salt, max_tokens=2, **fields)

    first, second = uuid.uuid4().hex, uuid.uuid4().hex
    cold, warm = ask(first), ask(first)
    assert cached(cold) == 0
    length = cold["usage"]["prompt_tokens"]
    assert (length - 1) // BLOCK * BLOCK <= cached(warm) < length
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]
    assert cached(ask(second)) == 0
    assert cached(ask(second)) == cached(warm)
    assert cached(ask(first, prompt_logprobs=1)) == 0


def test_b050_tokenize_and_detokenize(api: Api) -> None:
    for text in (STORY, "Grüße, 你好 🙂 \r\n\ttab", " leading and trailing "):
        token_ids = api.tokenize(text)
        back = api.post("/detokenize", {"model": api.model, "tokens": token_ids})
        assert back.json()["prompt"] == text
    counted = api.post("/tokenize", {"model": api.model, "messages": MESSAGES}).json()
    assert counted["count"] == len(counted["tokens"]) == api.chat(max_tokens=1)["usage"]["prompt_tokens"]


def test_b051_every_listed_model_can_be_asked(api: Api) -> None:
    listed = api.get("/v1/models").json()
    assert listed["object"] == "list"
    assert api.model in [model["id"] for model in listed["data"]]
    for model in listed["data"]:
        assert model["object"] == "model"
        assert api.get(f"/v1/models/{model['id']}").json()["id"] == model["id"]
        assert api.complete(model=model["id"], max_tokens=1)["model"] == model["id"]


def test_b052_health_answers_under_load(api: Api) -> None:
    """While a dozen long streams are under way."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(api.open(COMPLETIONS, prompt=f"{number} {STORY}", max_tokens=800, ignore_eos=True))
            for number in range(12)
        ]
        for events in streams:
            next(events)
        for _ in range(3):
            assert api.get("/health").status_code == 200
        assert next(streams[-1])["choices"][0]["finish_reason"] is None
