"""Tools through the chat API: what may be offered, what the model is told and may write, and what the client gets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from helpers import tiny_tokenizers
from helpers.gateway_api import Gateway, chat_body, events_of, make_gateway
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerFast

from baton.services.core.request import FinishReason, SampledToken
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.tokenizer import ModelTokenizer

CHAT = "/v1/chat/completions"
# What a template with tools does, in few words. Arguments are objects here, as in the templates of real models.
TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool.function.name }} {{ tool.function.parameters | tojson }};"
    "{% endfor %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}</tool_call>{% endfor %}"
    "{% if message.tool_call_id %}[{{ message.tool_call_id }}]{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture
def gateway() -> Any:
    gateway = make_gateway(tokenizer=ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=TEMPLATE)))
    yield gateway
    gateway.deps.grammars.close()


def body(**fields: Any) -> dict[str, Any]:
    return chat_body(tools=[WEATHER, NOW], max_tokens=200) | fields


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


def prompt_of(gateway: Gateway) -> str:
    return str(
        gateway.deps.tokenizer.pieces.decode(
            gateway.dispatcher.requests[-1].prompt_token_ids, skip_special_tokens=False
        )
    )


async def test_a_call_is_given_back_as_one(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = f"I look it up.\n{CALL}"
    answer = (await client.post(CHAT, json=body())).json()
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "I look it up.")
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": 2}
    assert gateway.dispatcher.requests[-1].sampling.grammar is None  # auto: the model is free
    assert gateway.dispatcher.requests[-1].stop_means == "tool_calls"


async def test_a_message_of_calls_alone_has_no_content(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = f"{CALL}\n{CALL_NOW}"
    message = (await client.post(CHAT, json=body())).json()["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "now"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def stream(client: httpx.AsyncClient, fields: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(CHAT, json=fields | {"stream": True})
    assert response.status_code == 200, response.text
    return [event["choices"][0] for event in events_of(response.text) if event["choices"]]


async def test_deltas_begin_with_the_name_and_go_on_with_arguments(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = f"Well.\n{CALL}\n{CALL_NOW}"
    choices = await stream(client, body())
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    calls: dict[int, str] = {}
    for delta in deltas:
        if delta["index"] not in calls:
            assert set(delta) == {"index", "id", "type", "function"}
            assert delta["function"]["name"] == ["get_weather", "now"][delta["index"]]
            calls[delta["index"]] = delta["function"]["arguments"]
        else:
            assert set(delta) == {"index", "function"}
            assert set(delta["function"]) == {"arguments"}
            calls[delta["index"]] += delta["function"]["arguments"]
    assert [json.loads(calls[index]) for index in (0, 1)] == [{"city": "Oslo", "days": 2}, {}]
    assert len(deltas) > 6  # as they come, not at their end
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Well."
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_what_only_looks_like_a_call_is_content(gateway: Gateway, client: httpx.AsyncClient) -> None:
    for text in ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "a <tool_call> b", "<tool_call>{"):
        gateway.dispatcher.reply = text
        (choice,) = (await client.post(CHAT, json=body())).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert "tool_calls" not in choice["message"]
        choices = await stream(client, body())
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == text


async def test_without_tools_and_with_none_text_stays_text(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = CALL
    for fields in (chat_body(max_tokens=200), body(tool_choice="none")):
        (choice,) = (await client.post(CHAT, json=fields)).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert "tools:" not in prompt_of(gateway)


async def test_one_call_at_most_without_parallel_calls(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = f"{CALL}\n{CALL_NOW}"
    (choice,) = (await client.post(CHAT, json=body(parallel_tool_calls=False))).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]


async def test_logprobs_and_usage_count_every_token(gateway: Gateway, client: httpx.AsyncClient) -> None:
    gateway.dispatcher.reply = CALL
    answer = (await client.post(CHAT, json=body(logprobs=True))).json()
    num_tokens = answer["usage"]["completion_tokens"]
    assert len(answer["choices"][0]["logprobs"]["content"]) == num_tokens
    choices = await stream(client, body(logprobs=True))
    assert sum(len((choice["logprobs"] or {"content": ()})["content"]) for choice in choices) == num_tokens


async def test_the_template_gets_tools_and_earlier_calls(gateway: Gateway, client: httpx.AsyncClient) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert (await client.post(CHAT, json=body(messages=messages))).status_code == 200
    prompt = prompt_of(gateway)
    assert "tools: get_weather" in prompt
    assert "<tool_call>get_weather city=Oslo</tool_call>" in prompt
    assert "rain[call_1]" in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": function(name="")}, "tools[0].function.name"),
        ({"tools": function(name="a b")}, "tools[0].function.name"),
        ({"tools": function(description=5)}, "tools[0].function.description"),
        ({"tools": function(strict="yes")}, "tools[0].function.strict"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"type": "foo"})}, "tools[0].function.parameters.type"),
        ({"tools": function(parameters={"type": "array"})}, "tools[0].function.parameters.type"),
        (
            {"tools": function(parameters={"properties": {"a": {"items": {"type": "int"}}}})},
            "tools[0].function.parameters.properties.a.items.type",
        ),
        ({"tools": function(parameters={"properties": []})}, "tools[0].function.parameters.properties"),
        ({"tools": function(parameters={"required": "a"})}, "tools[0].function.parameters.required"),
        ({"tools": function(parameters={"anyOf": []})}, "tools[0].function.parameters.anyOf"),
        ({"tools": function(parameters={"enum": ["v" * 300_000]})}, "tools[0].function.parameters"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {"tools": function(parameters={"not": {"type": "string"}}, strict=True), "tool_choice": "required"},
            "tools",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function.name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
    ],
)
async def test_bad_tools_are_refused_by_name(
    gateway: Gateway, client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(CHAT, json=body(**fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not gateway.dispatcher.requests
    assert (await client.post(CHAT, json=body())).status_code == 200


async def test_a_deep_schema_is_refused(client: httpx.AsyncClient) -> None:
    parameters: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        parameters = {"type": "object", "properties": {"a": parameters}}
    response = await client.post(CHAT, json=body(tools=function(parameters=parameters)))
    assert response.status_code == 400
    assert "100 levels" in response.json()["error"]["message"]


async def test_a_model_whose_format_is_not_known_takes_no_tools() -> None:
    async with make_gateway().client() as client:
        response = await client.post(CHAT, json=body())
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "--tool-call-parser" in response.json()["error"]["message"]


def accepts(grammar: str, text: str) -> bool:
    """Whether a worker could write ``text`` and end there."""
    backend = tiny_tokenizers.load("byte_level")
    tokenizer = LLTokenizer(backend.to_str(), n_vocab=backend.get_vocab_size(), eos_token=[0])
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = backend.encode(text).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


WRITTEN = {
    "hermes": (CALL, f"{CALL}\n{CALL_NOW}", CALL_NOW),
    "llama3_json": (
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}',
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}; {"name": "now", "parameters": {}}',
        '{"name": "now", "parameters": {}}',
    ),
    "mistral": (
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}]',
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}, {"name": "now", "arguments": {}}]',
        '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
    ),
    "pythonic": (
        '[get_weather(city="Oslo", days=2)]',
        '[get_weather(city="Oslo", days=2), now()]',
        "[now()]",
    ),
}


@pytest.mark.parametrize("format_name", sorted(WRITTEN))
async def test_required_and_named_choices_are_enforced_in_the_models_own_format(format_name: str) -> None:
    tokenizer = ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=TEMPLATE))
    gateway = make_gateway(tokenizer=tokenizer, tool_parser=format_name)
    one, two, other = WRITTEN[format_name]
    named = {"type": "function", "function": {"name": "get_weather"}}
    cases = {
        "required": ({"tool_choice": "required"}, {one: True, two: True, other: True}),
        "one": ({"tool_choice": "required", "parallel_tool_calls": False}, {one: True, two: False, other: True}),
        "named": ({"tool_choice": named}, {one: True, two: False, other: False}),
    }
    async with gateway.client() as client:
        for fields, expected in cases.values():
            gateway.dispatcher.reply = one
            answer = (await client.post(CHAT, json=body(**fields))).json()
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": 2}
            assert len(call["id"]) == (9 if format_name == "mistral" else 29)
            grammar = gateway.dispatcher.requests[-1].sampling.grammar or ""
            assert {text: accepts(grammar, text) for text in expected} == expected
            assert not accepts(grammar, "Hello")
            assert not accepts(grammar, one.replace("Oslo", "Bonn"))
    gateway.deps.grammars.close()


async def test_with_a_response_format_the_model_may_call_or_answer(gateway: Gateway, client: httpx.AsyncClient) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    fields = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert (await client.post(CHAT, json=body(response_format=fields))).status_code == 200
    grammar = gateway.dispatcher.requests[-1].sampling.grammar or ""
    assert accepts(grammar, CALL)
    assert accepts(grammar, '{"ok": true}')
    assert not accepts(grammar, '{"ok": 5}')


async def test_completions_know_no_tools(client: httpx.AsyncClient) -> None:
    for name, value in (("tools", [NOW]), ("tool_choice", "auto"), ("parallel_tool_calls", True)):
        response = await client.post("/v1/completions", json={"prompt": "x", name: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


async def test_markers_that_are_special_tokens_are_seen_and_written_as_tokens() -> None:
    backend = tiny_tokenizers.load("byte_level")
    backend.add_special_tokens(["[TOOL_CALLS]", "<think>", "</think>"])
    template = TEMPLATE + "{# [TOOL_CALLS] <think></think> #}"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tiny_tokenizers.END_OF_TEXT, chat_template=template
    )
    model = replace(make_gateway().deps.model, vocab_size=backend.get_vocab_size())
    gateway = make_gateway(tokenizer=ModelTokenizer(fast), model=model, tool_parser="mistral")
    text = '<think>hello</think>[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    ids = backend.encode(text).ids
    end = backend.token_to_id(tiny_tokenizers.TURN_END)
    gateway.dispatcher.script = lambda request: [
        *(TokenDelta(index, (SampledToken(token_id),)) for index, token_id in enumerate(ids)),
        TokenDelta(len(ids), (SampledToken(end),), FinishReason.STOP),
    ]
    async with gateway.client() as client:
        for fields in (body(), body(tool_choice="required")):
            (choice,) = (await client.post(CHAT, json=fields)).json()["choices"]
            assert choice["message"]["reasoning_content"] == "hello"
            assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
        grammar = gateway.dispatcher.requests[-1].sampling.grammar or ""
        (choice,) = (await client.post(CHAT, json=chat_body())).json()["choices"]
        assert "[TOOL_CALLS]" not in choice["message"]["content"]  # nobody asked for it
    gateway.deps.grammars.close()
    tokenizer = LLTokenizer(backend.to_str(), n_vocab=backend.get_vocab_size(), eos_token=[0])
    matcher = LLMatcher(tokenizer, grammar)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()
