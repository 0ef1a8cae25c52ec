"""Reasoning: told from the answer however it is cut, counted, and free of any grammar."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from helpers import tiny_tokenizers
from helpers.gateway_api import Gateway, chat_body, events_of, make_gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from baton.services.gateway.reasoning import KINDS, ReasoningParser
from baton.services.gateway.required_output import is_thinking
from baton.services.gateway.tokenizer import ModelTokenizer

CHAT = "/v1/chat/completions"
# As Qwen3's: with enable_thinking false the prompt has closed thoughts; as DeepSeek R1's, "thinking" opens them.
TEMPLATE = tiny_tokenizers.CHAT_TEMPLATE + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% if thinking %}<think>\n{% endif %}{# <tool_call> #}"
)
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
THINK = KINDS["think"]


@pytest.fixture
def gateway() -> Any:
    gateway = make_gateway(tokenizer=ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=TEMPLATE)))
    yield gateway
    gateway.deps.grammars.close()


def read(text: list[str], *, is_open: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(THINK, is_open=is_open)
    told = [*map(parser.feed, text), parser.finish()]
    return "".join(thought for thought, _ in told), "".join(answer for _, answer in told)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nso it is\n</think>\n\nYes.", False, ("so it is", "Yes.")),
        ("\n<think>a</think>b", False, ("a", "b")),
        ("so it is\n</think>\nYes. ", True, ("so it is", "Yes. ")),
        ("no thought here", False, ("", "no thought here")),
        (" <thin", False, ("", " <thin")),
        ("a <think>b</think>", False, ("", "a <think>b</think>")),
        ("<think>never ends", False, ("never ends", "")),
        ("<think>a </thin", False, ("a </thin", "")),
        ("<think></think>", False, ("", "")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        ("", True, ("", "")),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert read([text], is_open=is_open) == expected
    assert read(list(text), is_open=is_open) == expected


FRAGMENTS = ["<think>", "</think>", "<", "</thi", "nk>", " ", "\n", "a", "é🙂", "</", "think>"]


@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join), is_open=st.booleans(), data=st.data())
@settings(max_examples=120, deadline=None)
def test_however_a_text_is_cut_the_same_comes_out(text: str, is_open: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    assert read(parts, is_open=is_open) == read([text], is_open=is_open) == read(list(text), is_open=is_open)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("assistant\n", False),
        ("assistant\n<think>", True),
        ("assistant\n<think>\n", True),
        ("assistant\n<think>\n\n</think>\n\n", None),
        ("<think>x</think> earlier <|im_end|> assistant\n", False),
    ],
)
def test_prompts_open_and_close_thoughts(tail: str, expected: bool | None) -> None:
    assert is_thinking(THINK, tail) is expected


async def test_reasoning_has_a_field_of_its_own_and_is_counted(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = "<think>\nhello world\n</think>\n\nthe quick brown fox"
    answer = (await client.post(CHAT, json=chat_body(max_tokens=200))).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "the quick brown fox"
    assert message["reasoning_content"] == message["reasoning"] == "hello world"
    thoughts = gateway.dispatcher.encode("<think>\nhello world\n</think>")
    details = answer["usage"]["completion_tokens_details"]
    assert abs(details["reasoning_tokens"] - len(thoughts)) <= 1  # a token may reach over the end of thoughts
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_streamed_reasoning_is_never_mixed_into_content(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = "<think>hello world, hello</think>the dog does not mind"
    fields = chat_body(max_tokens=200, stream=True, stream_options={"include_usage": True})
    events = events_of((await client.post(CHAT, json=fields)).text)
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert all(not (delta.get("content") and delta.get("reasoning_content")) for delta in deltas)
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hello world, hello"
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == "hello world, hello"
    assert "".join(delta.get("content") or "" for delta in deltas) == "the dog does not mind"
    kinds = [next(iter(delta)) for delta in deltas if delta.get("content") or delta.get("reasoning_content")]
    assert kinds == sorted(kinds, reverse=True)  # reasoning first
    assert events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 5


async def test_a_template_may_open_the_thoughts(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = "hello</think>world"
    fields = chat_body(chat_template_kwargs={"thinking": True})
    message = (await client.post(CHAT, json=fields)).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hello", "world")


async def test_a_call_in_thoughts_is_none(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = f"<think>maybe {CALL}</think>\n{CALL}"
    fields = chat_body(tools=[{"type": "function", "function": {"name": "now"}}], max_tokens=300)
    (choice,) = (await client.post(CHAT, json=fields)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["message"]["reasoning_content"] == f"maybe {CALL}"


async def test_answers_that_are_cut_in_thoughts_have_no_content(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = "<think>" + "hello world " * 20
    answer = (await client.post(CHAT, json=chat_body(max_tokens=30))).json()
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 30


async def test_models_without_thoughts_have_no_such_fields() -> None:
    async with make_gateway().client() as client:
        answer = (await client.post(CHAT, json=chat_body())).json()
    assert "reasoning_content" not in answer["choices"][0]["message"]
    assert "completion_tokens_details" not in answer["usage"]


def accepts(grammar: str, text: str) -> bool:
    """Whether a worker could write ``text`` and end there."""
    backend = tiny_tokenizers.load("byte_level")
    tokenizer = LLTokenizer(backend.to_str(), n_vocab=backend.get_vocab_size(), eos_token=[0])
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = backend.encode(text).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("switches", "good", "bad"),
    [
        ({}, ["<think>so {x}\n</think>\n\nyes", "yes"], ["<think>so</think>maybe", "so</think>yes", "<think>yes"]),
        ({"thinking": True}, ["so {x}</think>\nyes", "</think>yes"], ["yes", "so</think>maybe"]),
        ({"enable_thinking": False}, ["yes", "no"], ["<think>so</think>yes"]),
    ],
)
async def test_the_grammar_begins_behind_the_thoughts(
    gateway: Gateway, client: httpx.AsyncClient, switches: dict[str, bool], good: list[str], bad: list[str]
) -> None:
    fields = chat_body(structured_outputs={"choice": ["yes", "no"]}, chat_template_kwargs=switches)
    assert (await client.post(CHAT, json=fields)).status_code == 200
    grammar = gateway.dispatcher.requests[-1].sampling.grammar or ""
    assert {text: accepts(grammar, text) for text in good} == dict.fromkeys(good, True)
    assert {text: accepts(grammar, text) for text in bad} == dict.fromkeys(bad, False)
    assert json.loads(grammar)
