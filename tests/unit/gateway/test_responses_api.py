"""OpenAI's Responses API over a scripted dispatcher: what reaches the model, and the order of the events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from helpers import tiny_tokenizers
from helpers.gateway_api import MAX_MODEL_LEN, MODEL, REPLY, Gateway, make_gateway, named_events, prompt_of
from helpers.tool_templates import TOOL_TEMPLATE

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.sse import Cut
from baton.services.gateway.tokenizer import ModelTokenizer

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "hello"} | fields


@pytest.fixture
def tool_gateway() -> Gateway:
    return make_gateway(tokenizer=ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=TOOL_TEMPLATE)))


def events_of(text: str) -> list[dict[str, Any]]:
    """They are numbered from 0 on without gaps."""
    events = named_events(text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what is made up for each."""
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]
    return {name: value for name, value in response.items() if name not in ("id", "created_at")} | {"output": output}


async def test_a_whole_response(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.dispatcher.cached_tokens = 3
    asked = body(instructions="be brief", metadata={"a": "b"}, temperature=0.5)
    answer = (await client.post(PATH, json=asked, headers={"x-request-id": "abc"})).json()
    assert answer["id"] == "resp_abc"
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", MODEL)
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": REPLY, "annotations": [], "logprobs": []}]
    num_prompt_tokens = len(gateway.dispatcher.requests[0].prompt_token_ids)
    num_tokens = len(gateway.dispatcher.encode(REPLY)) + 1
    assert answer["usage"] == {
        "input_tokens": num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt_tokens + num_tokens,
    }
    assert (answer["instructions"], answer["metadata"], answer["temperature"]) == ("be brief", {"a": "b"}, 0.5)
    assert (answer["error"], answer["incomplete_details"], answer["store"]) == (None, None, False)
    assert prompt_of(gateway).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello")


async def test_the_events_come_in_openais_order(client: httpx.AsyncClient) -> None:
    whole = (await client.post(PATH, json=body())).json()
    events = events_of((await client.post(PATH, json=body(stream=True))).text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    start, end = kinds.index("output_text.delta"), kinds.index("output_text.done")
    assert kinds[:start] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[start:end]) == {"output_text.delta"}
    assert kinds[end:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == []
    assert events[3]["part"]["text"] == ""
    assert "".join(event["delta"] for event in events[start:end]) == REPLY == events[end]["text"]
    item_ids = {event["item_id"] for event in events if "item_id" in event}
    assert item_ids == {events[-1]["response"]["output"][0]["id"]}
    assert without_ids(events[-1]["response"]) == without_ids(whole)


async def test_a_response_that_is_cut_is_incomplete(client: httpx.AsyncClient) -> None:
    answer = (await client.post(PATH, json=body(max_output_tokens=3))).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    events = events_of((await client.post(PATH, json=body(max_output_tokens=3, stream=True))).text)
    assert events[-1]["type"] == "response.incomplete"


async def test_items_become_a_conversation(client: httpx.AsyncClient, gateway: Gateway) -> None:
    items = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"role": "user", "content": "three"},
    ]
    assert (await client.post(PATH, json=body(input=items))).status_code == 200
    assert prompt_of(gateway) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_calls_are_items_and_their_outputs_come_back(tool_gateway: Gateway) -> None:
    tool_gateway.dispatcher.reply = f"Let me see. {CALL}"
    async with tool_gateway.client() as client:
        answer = (await client.post(PATH, json=body(tools=[TOOL]))).json()
        message, call = answer["output"]
        assert message["content"][0]["text"].strip() == "Let me see."
        assert (call["type"], call["name"], call["status"]) == ("function_call", "weather", "completed")
        assert json.loads(call["arguments"]) == {"city": "Ulm"}

        events = events_of((await client.post(PATH, json=body(tools=[TOOL], stream=True))).text)
        of_call = [event for event in events if event.get("output_index") == 1]
        kinds = [event["type"].removeprefix("response.") for event in of_call]
        assert kinds[0] == "output_item.added"
        assert set(kinds[1:-2]) == {"function_call_arguments.delta"}
        assert kinds[-2:] == ["function_call_arguments.done", "output_item.done"]
        assert of_call[0]["item"]["arguments"] == ""
        joined = "".join(event["delta"] for event in of_call[1:-2])
        assert joined == of_call[-2]["arguments"] == call["arguments"]

        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
        items = [{"role": "user", "content": "hello"}, *answer["output"], output]
        response = await client.post(PATH, json=body(input=items, tools=[TOOL]))
        assert response.status_code == 200, response.text
    prompt = prompt_of(tool_gateway)
    assert prompt.count("<|im_start|>assistant") == 2, "what was said and called in one turn is one message"
    assert '"city": "Ulm"' in prompt
    assert "rain" in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "pirate", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0].call_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": MAX_MODEL_LEN}, "max_output_tokens"),
        ({"input": "x" * 10**6}, "input"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
async def test_what_is_wrong_or_not_kept_is_named(
    client: httpx.AsyncClient, gateway: Gateway, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        response = await client.post(PATH, json=body(stream=stream, **fields))
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
    assert not gateway.dispatcher.requests
    assert (await client.post(PATH, json=body())).status_code == 200


async def test_stored_responses_and_embeddings_are_refused_clearly(client: httpx.AsyncClient) -> None:
    answer = (await client.post(PATH, json=body(store=True))).json()
    assert answer["store"] is False
    for method, path in (("GET", answer["id"]), ("DELETE", answer["id"]), ("POST", f"{answer['id']}/cancel")):
        response = await client.request(method, f"{PATH}/{path}")
        assert response.status_code == 404
        assert "not kept" in response.json()["error"]["message"]
    refused = await client.post("/v1/embeddings", json={"model": MODEL, "input": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_supported")


async def test_a_failure_in_a_stream_ends_the_response(client: httpx.AsyncClient, gateway: Gateway) -> None:
    deltas = gateway.dispatcher.speak
    gateway.dispatcher.script = lambda request: [*deltas(request)[:2], BatonError(ErrorCode.WORKER_LOST, "gone")]
    events = events_of((await client.post(PATH, json=body(stream=True))).text)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "worker_lost"
    assert events[-1]["response"]["status"] == "failed"
    assert "gone" not in json.dumps(events[-1])
    assert (await client.post(PATH, json=body())).json()["error"]["code"] == "worker_lost"


async def test_what_runs_when_the_gateway_ends_is_told_so(gateway: Gateway) -> None:
    cut: Cut = gateway.deps.cut
    deltas = gateway.dispatcher.speak

    def until_cut(request: Any) -> Any:
        yield from deltas(request)[:2]
        cut.set()
        yield asyncio.Event()

    gateway.dispatcher.script = until_cut
    async with gateway.client() as client:
        events = events_of((await client.post(PATH, json=body(stream=True))).text)
        assert events[-1]["response"]["error"]["code"] == "draining"
        assert (await client.post(PATH, json=body())).status_code == 503
    assert not gateway.dispatcher.running
