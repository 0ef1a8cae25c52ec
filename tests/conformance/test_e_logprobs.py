"""E. Logprobs: of the model's own distribution, before temperature."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers.api_client import CHAT, COMPLETIONS, MESSAGES, PROMPT, Api

LONG = {"max_tokens": 10, "ignore_eos": True}
LIST_NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def chat_entries(api: Api, k: int, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    choice = api.chat(**(LONG | {"logprobs": True, "top_logprobs": k} | fields))["choices"][0]
    return list(choice["logprobs"]["content"]), str(choice["message"]["content"])


def completion_lists(api: Api, k: int, **fields: Any) -> tuple[dict[str, list[Any]], str]:
    choice = api.complete(**(LONG | {"logprobs": k} | fields))["choices"][0]
    return {name: choice["logprobs"][name] for name in LIST_NAMES}, str(choice["text"])


@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_b079_one_entry_per_token_with_k_alternatives(api: Api, k: int) -> None:
    entries, _ = chat_entries(api, k)
    assert len(entries) == 10
    for entry in entries:
        assert set(entry) >= {"token", "logprob", "bytes", "top_logprobs"}
        assert isinstance(entry["token"], str)
        assert all(0 <= byte <= 255 for byte in entry["bytes"] or [])
        assert len(entry["top_logprobs"]) == k


def test_b080_values_are_finite_and_sorted(api: Api) -> None:
    for fields in ({}, {"temperature": 1.5, "seed": 1}, {"logit_bias": {str(api.tokenize(" fox")[-1]): -100}}):
        for entry in chat_entries(api, 20, **fields)[0]:
            top = [alternative["logprob"] for alternative in entry["top_logprobs"]]
            assert top == sorted(top, reverse=True)
            assert all(-9999.0 <= logprob <= 0 for logprob in (*top, entry["logprob"]))
            assert entry["logprob"] <= top[0] + 1e-6


def test_b081_the_bytes_join_to_the_content(api: Api) -> None:
    entries, text = chat_entries(api, 0)
    assert b"".join(bytes(entry["bytes"] or []) for entry in entries).decode(errors="replace") == text


@pytest.mark.parametrize("k", [0, 1, 4])
def test_b082_the_lists_of_completions(api: Api, k: int) -> None:
    lists, text = completion_lists(api, k)
    assert {len(values) for values in lists.values()} == {10}
    assert "".join(lists["tokens"]) == text
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        start = offset - lists["text_offset"][0]
        assert text[start : start + len(token)] == token
    for top in lists["top_logprobs"]:
        assert top is None or max(1, k) <= len(top) <= k + 1


def test_b082_an_echoed_prompt_begins_with_null(api: Api) -> None:
    lists, text = completion_lists(api, 2, echo=True)
    num_prompt_tokens = api.complete(max_tokens=1)["usage"]["prompt_tokens"]
    assert {len(values) for values in lists.values()} == {num_prompt_tokens + 10}
    assert lists["token_logprobs"][0] is None
    assert all(math.isfinite(logprob) and logprob <= 0 for logprob in lists["token_logprobs"][1:])
    assert text.startswith(PROMPT)


def test_b083_with_a_stop_string_the_text_may_be_shorter_than_its_tokens(api: Api) -> None:
    _, free = completion_lists(api, 0)
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    answer = api.complete(**LONG, logprobs=0, stop=stop)
    choice = answer["choices"][0]
    assert choice["text"] == free[: free.index(stop)]
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"]
    assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])


def test_b084_the_streams_logprobs_are_those_of_the_whole_answer(api: Api) -> None:
    whole, _ = chat_entries(api, 3)
    stream = api.stream(CHAT, **LONG, logprobs=True, top_logprobs=3)
    streamed = [entry for choice in stream.choice_events() for entry in (choice["logprobs"] or {}).get("content") or []]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]
    assert [entry["logprob"] for entry in streamed] == pytest.approx([entry["logprob"] for entry in whole], abs=1e-3)
    lists, _ = completion_lists(api, 3)
    events = api.stream(COMPLETIONS, **LONG, logprobs=3).choice_events()
    for name in ("tokens", "text_offset"):
        assert [value for choice in events for value in (choice["logprobs"] or {}).get(name) or []] == lists[name]


def test_b085_the_first_tokens_prompt_logprob_is_null(api: Api) -> None:
    for answer, path in ((api.chat(prompt_logprobs=2), CHAT), (api.complete(prompt_logprobs=2), COMPLETIONS)):
        listed = answer["prompt_logprobs"] if path == CHAT else answer["choices"][0]["prompt_logprobs"]
        assert len(listed) == answer["usage"]["prompt_tokens"]
        assert listed[0] is None
        for entry in listed[1:]:
            assert 2 <= len(entry) <= 3
            assert all(value["logprob"] <= 0 for value in entry.values())


def test_b086_values_do_not_depend_on_temperature(api: Api) -> None:
    """They are of the raw distribution: for the same token after the same text the same, however it was sampled."""
    greedy, _ = chat_entries(api, 5, max_tokens=1)
    hot, _ = chat_entries(api, 5, max_tokens=1, temperature=1.9, seed=5, messages=MESSAGES)
    assert [one["token"] for one in hot[0]["top_logprobs"]] == [one["token"] for one in greedy[0]["top_logprobs"]]
    values = [[one["logprob"] for one in entries[0]["top_logprobs"]] for entries in (hot, greedy)]
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_b086_under_a_constraint_values_stay_finite_and_raw(api: Api) -> None:
    """What the constraint forbids keeps its logprob, so that the chosen token need not be among the likeliest."""
    fields = {"structured_outputs": {"choice": ["zebra"]}, "logprobs": True, "top_logprobs": 5, "ignore_eos": False}
    if api.post(CHAT, api.body(CHAT, **fields)).status_code != 200:
        pytest.skip("the server has no structured_outputs")
    entries, text = chat_entries(api, 5, **fields)
    assert text == "zebra"
    for entry in entries:
        assert all(-9999.0 <= value["logprob"] <= 0 for value in (*entry["top_logprobs"], entry))
    free, _ = chat_entries(api, 5, max_tokens=1)
    assert entries[0]["top_logprobs"] == free[0]["top_logprobs"]
