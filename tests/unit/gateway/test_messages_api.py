"""Anthropic's Messages API over a scripted dispatcher: what reaches the model, and the protocol of the answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from helpers import tiny_tokenizers
from helpers.gateway_api import MAX_MODEL_LEN, MODEL, REPLY, Gateway, make_gateway, named_events, prompt_of
from helpers.tool_templates import TOOL_TEMPLATE

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.limits import Limits
from baton.services.gateway.tokenizer import ModelTokenizer

PATH = "/v1/messages"
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object", "properties": {"city": {}}}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 64} | fields


@pytest.fixture
def tool_gateway() -> Gateway:
    return make_gateway(tokenizer=ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=TOOL_TEMPLATE)))


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    answer = response.json()
    assert set(answer) == {"type", "error"}
    assert answer["type"] == "error"
    assert set(answer["error"]) == {"type", "message"}
    return dict(answer["error"])


async def test_a_whole_answer_has_anthropics_shape(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.dispatcher.cached_tokens = 3
    answer = (await client.post(PATH, json=body(), headers={"x-request-id": "abc"})).json()
    num_prompt_tokens = len(gateway.dispatcher.requests[0].prompt_token_ids)
    assert answer == {
        "id": "msg_abc",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": REPLY}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": num_prompt_tokens - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": len(gateway.dispatcher.encode(REPLY)) + 1,
        },
    }


async def test_the_stream_follows_the_protocol(client: httpx.AsyncClient) -> None:
    whole = (await client.post(PATH, json=body())).json()
    response = await client.post(PATH, json=body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == REPLY
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]


async def test_stop_reasons(client: httpx.AsyncClient) -> None:
    cut = (await client.post(PATH, json=body(max_tokens=3))).json()
    assert cut["stop_reason"] == "max_tokens"
    stopped = (await client.post(PATH, json=body(stop_sequences=["brown"]))).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "brown")
    assert stopped["content"] == [{"type": "text", "text": "the quick "}]


async def test_system_blocks_and_turns_reach_the_template(client: httpx.AsyncClient, gateway: Gateway) -> None:
    system = [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief"}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
        {"role": "user", "content": "four"},
    ]
    assert (await client.post(PATH, json=body(system=system, messages=messages))).status_code == 200
    assert prompt_of(gateway) == (
        "<|im_start|>system\nbe\nbrief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\nfour<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_last_turn_of_the_assistant_is_gone_on_with(client: httpx.AsyncClient, gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    assert (await client.post(PATH, json=body(messages=messages))).status_code == 200
    assert prompt_of(gateway).endswith("<|im_start|>assistant\nThe answer")


async def test_sampling_fields_reach_the_sampler(client: httpx.AsyncClient, gateway: Gateway) -> None:
    await client.post(PATH, json=body(temperature=0.5, top_p=0.9, top_k=7, seed=3))
    sampling = gateway.dispatcher.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
    assert sampling.max_tokens == 64


async def test_a_call_is_a_block_and_its_result_a_message(tool_gateway: Gateway) -> None:
    tool_gateway.dispatcher.reply = f"Let me see. {CALL}"
    async with tool_gateway.client() as client:
        answer = (await client.post(PATH, json=body(tools=[TOOL], max_tokens=200))).json()
        text, call = answer["content"]
        assert text["text"].strip() == "Let me see."
        assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Ulm"})
        assert answer["stop_reason"] == "tool_use"

        events = named_events((await client.post(PATH, json=body(tools=[TOOL], max_tokens=200, stream=True))).text)
        starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        assert [start["type"] for start in starts] == ["text", "tool_use"]
        assert starts[1]["input"] == {}
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        joined = "".join(delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta")
        assert json.loads(joined) == {"city": "Ulm"}
        indices = [event["index"] for event in events if event["type"] == "content_block_stop"]
        assert indices == [0, 1]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"

        result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "rain"}]}
        turns = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
        ]
        response = await client.post(PATH, json=body(tools=[TOOL], messages=turns, max_tokens=100))
        assert response.status_code == 200, response.text
    prompt = prompt_of(tool_gateway)
    assert '"city": "Ulm"' in prompt
    assert prompt.index("rain") < prompt.index("and?")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens is required"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role must be user or assistant"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type must be"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y"}]}]}, "content[0].input"),
        ({"system": [{"type": "image"}]}, "system[0].type must be"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": -1}, "temperature must be"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type must be"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type must be"),
        ({"thinking": {"type": "maybe"}}, "thinking.type must be"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type must be"),
        ({"max_tokens": MAX_MODEL_LEN}, f"maximum context length is {MAX_MODEL_LEN} tokens"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
async def test_what_is_wrong_is_named_in_anthropics_shape(
    client: httpx.AsyncClient, gateway: Gateway, fields: dict[str, Any], words: str
) -> None:
    for stream in (False, True):
        error = error_of(await client.post(PATH, json=body(stream=stream, **fields)))
        assert error["type"] == "invalid_request_error"
        assert words in error["message"]
    assert not gateway.dispatcher.requests
    assert (await client.post(PATH, json=body())).status_code == 200


async def test_other_refusals_have_anthropics_words() -> None:
    gateway = make_gateway(authenticator=Authenticator(["secret"]), limits=Limits(max_concurrent_requests=1))
    async with gateway.client() as client:
        assert error_of(await client.post(PATH, json=body()), 401)["type"] == "authentication_error"
        key = {"x-api-key": "secret"}
        assert (
            error_of(await client.post(PATH, json=body(model="nobody"), headers=key), 404)["type"] == "not_found_error"
        )
        assert error_of(await client.post(PATH, content=b"{", headers=key))["type"] == "invalid_request_error"
        assert error_of(await client.get(PATH, headers=key), 405)["type"] == "invalid_request_error"
        with gateway.deps.door.enter():
            assert error_of(await client.post(PATH, json=body(), headers=key), 503)["type"] == "overloaded_error"
        assert (await client.post(PATH, json=body(), headers=key)).status_code == 200


async def test_a_failure_in_a_stream_is_an_error_event(client: httpx.AsyncClient, gateway: Gateway) -> None:
    deltas = gateway.dispatcher.speak
    gateway.dispatcher.script = lambda request: [*deltas(request)[:2], BatonError(ErrorCode.WORKER_LOST, "gone")]
    events = named_events((await client.post(PATH, json=body(stream=True))).text)
    assert events[0]["type"] == "message_start"
    assert events[-1]["error"]["type"] == "overloaded_error"
    assert "gone" not in events[-1]["error"]["message"]


async def test_tokens_are_counted_as_a_message_counts_them(client: httpx.AsyncClient) -> None:
    asked = {name: value for name, value in body(system="be brief").items() if name != "max_tokens"}
    counted = (await client.post(f"{PATH}/count_tokens", json=asked)).json()
    used = (await client.post(PATH, json=asked | {"max_tokens": 1})).json()["usage"]
    assert counted == {"input_tokens": used["input_tokens"]}
    assert error_of(await client.post(f"{PATH}/count_tokens", json={}))["message"].startswith("messages")
