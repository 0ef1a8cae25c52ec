"""D. Text edges: stop strings, ends, and characters that are several tokens."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.api_client import CHAT, COMPLETIONS, Api

STORY = "One day the fox went out to look for the old key of the house"
# Sampled, since greedy text soon repeats itself; with a seed, so that it is the same every time.
LONG = {"prompt": STORY, "max_tokens": 24, "ignore_eos": True, "temperature": 0.9, "seed": 7}
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def free(api: Api) -> dict[str, Any]:
    """What the model says when nothing stops it, token by token."""
    choice = dict(api.complete(**LONG, logprobs=0, return_token_ids=True)["choices"][0])
    assert REPLACEMENT not in choice["text"], "the model's text is no text: choose another prompt"
    return choice


def spanning(free: dict[str, Any]) -> str:
    """Text that crosses the border of two tokens in the middle, and stands nowhere before."""
    text, offsets = (
        free["text"],
        [offset - free["logprobs"]["text_offset"][0] for offset in free["logprobs"]["text_offset"]],
    )
    for border in offsets[6:-2]:
        candidate = text[border - 2 : border + 2]
        if len(candidate) == 4 and text.index(candidate) == border - 2:
            return str(candidate)
    pytest.fail(f"no text crosses a border of tokens only once: {text!r}")


def check_stopped(api: Api, stop: str | list[str], expected: str, **fields: Any) -> None:
    whole = api.complete(**LONG, stop=stop, **fields)["choices"][0]
    stream = api.stream(COMPLETIONS, **LONG, stop=stop, **fields)
    assert (whole["text"], whole["finish_reason"]) == (expected, "stop")
    assert (stream.text(), stream.finish_reason()) == (expected, "stop")


def test_b068_a_stop_string_over_two_tokens(api: Api, free: dict[str, Any]) -> None:
    text, stop = free["text"], spanning(free)
    before = text[: text.index(stop)]
    check_stopped(api, stop, before)
    check_stopped(api, stop, before + stop, include_stop_str_in_output=True)


def test_b069_the_earliest_match_wins_and_the_prompt_is_not_searched(api: Api, free: dict[str, Any]) -> None:
    text, stop = free["text"], spanning(free)
    earlier = text[4:7]
    check_stopped(api, [stop, earlier], text[: text.index(earlier)])
    in_prompt = "house"
    assert in_prompt not in text, "the model repeats the prompt: choose another word"
    assert api.complete(**LONG, stop=in_prompt)["choices"][0]["text"] == text


def test_b070_a_stop_string_in_the_first_token(api: Api, free: dict[str, Any]) -> None:
    check_stopped(api, free["text"][0], "")


def test_b071_text_that_turns_out_not_to_be_a_stop_string_comes_out(api: Api, free: dict[str, Any]) -> None:
    text = free["text"]
    for stop in (text[-6:] + "#", text[5:9] + "#"):
        assert api.complete(**LONG, stop=stop)["choices"][0]["text"] == text
        stream = api.stream(COMPLETIONS, **LONG, stop=stop)
        assert (stream.text(), stream.finish_reason()) == (text, "length")


def test_b072_a_stop_token_is_counted(api: Api, free: dict[str, Any]) -> None:
    ids = free["token_ids"]
    position = next(i for i in range(4, len(ids)) if ids.index(ids[i]) == i)
    answer = api.complete(**LONG, stop_token_ids=[ids[position]])
    assert answer["usage"]["completion_tokens"] == position + 1
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert free["text"].startswith(answer["choices"][0]["text"])


def test_b073_min_tokens_keeps_ends_away(api: Api, free: dict[str, Any]) -> None:
    stop_id = free["token_ids"][2]
    choice = api.complete(**LONG, stop_token_ids=[stop_id], min_tokens=12, return_token_ids=True)["choices"][0]
    assert len(choice["token_ids"]) >= 12
    assert stop_id not in choice["token_ids"][:12]
    assert api.chat(max_tokens=60)["usage"]["completion_tokens"] < 40, (
        "the model does not end its answer: choose another"
    )
    assert api.chat(max_tokens=60, min_tokens=40)["usage"]["completion_tokens"] >= 40


def test_b074_a_character_is_never_sent_in_parts(api: Api) -> None:
    """The model is made to say characters of several tokens each, and no event has half of one."""
    wanted = "🙂é漢👩‍👩‍👧!"
    fields: dict[str, Any] = {"max_tokens": 100, "structured_outputs": {"choice": [wanted]}}
    fields["chat_template_kwargs"] = {"enable_thinking": False}
    response = api.post(CHAT, api.body(CHAT, **fields))
    if response.status_code == 400:
        pytest.skip("the server has no structured_outputs")
    stream = api.stream(CHAT, **fields)
    assert stream.text() == wanted
    assert all(REPLACEMENT not in (choice["delta"].get("content") or "") for choice in stream.choice_events())


def test_b075_half_a_character_at_the_end_of_the_prompt_does_not_leak(api: Api) -> None:
    ids = api.tokenize("🙂")
    if len(ids) < 2:
        pytest.skip("the model's tokenizer has this character as one token")
    prompt = [*api.tokenize("a fox"), *ids[:-1]]
    completed = api.complete(prompt=prompt, max_tokens=1, logit_bias={str(ids[-1]): 100})["choices"][0]["text"]
    assert completed in ("🙂", "")
    other = str(api.tokenize(" fox")[-1])
    for fields in ({}, {"stream": True}):
        body = {"prompt": prompt, "max_tokens": 1, "logit_bias": {other: 100}}
        text = api.stream(COMPLETIONS, **body).text() if fields else api.complete(**body)["choices"][0]["text"]
        assert text.removeprefix(REPLACEMENT).strip() == "fox"


def test_b076_half_a_character_at_the_end_is_one_replacement(api: Api) -> None:
    ids = api.tokenize("漢")
    if len(ids) < 2:
        pytest.skip("the model's tokenizer has this character as one token")
    fields: dict[str, Any] = {"prompt": STORY, "max_tokens": 1, "logit_bias": {str(ids[0]): 100}, "ignore_eos": True}
    assert api.complete(**fields)["choices"][0]["text"].strip() == REPLACEMENT
    assert api.stream(COMPLETIONS, **fields).text().strip() == REPLACEMENT


@pytest.mark.parametrize(
    "text",
    ["👩‍👩‍👧 family", "e\u0301 combined", "مرحبا بالعالم", "a\r\nb\r\n", "tab\tand\u00a0space", "\U0001f1e9\U0001f1ea"],
)
def test_b077_unusual_text_survives(api: Api, text: str) -> None:
    assert api.complete(prompt=text, echo=True, max_tokens=1)["choices"][0]["text"].startswith(text)
    assert api.stream(COMPLETIONS, prompt=text, echo=True, max_tokens=1).text().startswith(text)
    assert api.chat(messages=[{"role": "user", "content": text}], max_tokens=1)["choices"]


def test_b078_special_tokens_are_hidden_or_shown(api: Api) -> None:
    ended = api.chat(max_tokens=200, return_token_ids=True)["choices"][0]
    assert ended["finish_reason"] == "stop", "the model does not end its answer: choose another"
    end = ended["token_ids"][-1]
    fields: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True, "logit_bias": {str(end): 100}}
    assert api.chat(**fields)["choices"][0]["message"]["content"] == ""
    shown = api.chat(**fields, skip_special_tokens=False)["choices"][0]["message"]["content"]
    assert shown
    assert shown == 2 * shown[: len(shown) // 2]
    assert api.stream(CHAT, **fields, skip_special_tokens=False).text() == shown
