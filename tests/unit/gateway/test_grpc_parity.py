"""gRPC Generate can ask for whatever REST can: constraints, tools, thoughts, echo, logprobs of the prompt."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from helpers import tiny_tokenizers
from helpers.gateway_api import REPLY, Gateway, make_gateway
from helpers.tool_templates import TOOL_TEMPLATE

from baton.api.common.v1 import common_pb2
from baton.api.inference.v1 import inference_pb2, inference_pb2_grpc
from baton.services.core.sessions import SessionTag
from baton.services.gateway.grpc_inference import InferenceServicer
from baton.services.gateway.openai_models import ChatCompletionBody, CompletionBody
from baton.services.gateway.tokenizer import ModelTokenizer
from baton.services.runtime.grpc import bind_server, create_server

Request = inference_pb2.GenerateRequest
TOOL = {"name": "weather", "description": "Tells it.", "parameters": '{"type": "object", "properties": {"city": {}}}'}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
# What is called otherwise here, comes as metadata, or means nothing where every answer is a stream of tokens.
OTHERWISE = {
    "prompt": "text, tokens",
    "messages": "chat",
    "max_completion_tokens": "max_tokens",
    "top_logprobs": "logprobs",
    "response_format": "json_schema, json_object",
    "structured_outputs": "json_schema, json_object, regex, choice, grammar",
    "chat_template_kwargs": "chat.enable_thinking",
    "add_generation_prompt": "chat.add_generation_prompt",
    "continue_final_message": "chat.continue_final_message",
    "prompt_cache_retention": "session_ttl_s",
    "slo": "metadata x-slo-ttft-ms, x-slo-tpot-ms",
    "stream": "always",
    "stream_options": "the last message has the usage",
    "return_token_ids": "always",
    "best_of": "only ever n",
}


@asynccontextmanager
async def served(gateway: Gateway) -> AsyncIterator[Any]:
    server = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(gateway.deps), server)
    port = bind_server(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield inference_pb2_grpc.InferenceServiceStub(channel)
    finally:
        await server.stop(None)


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with served(gateway) as stub:
        yield stub


async def generate(stub: Any, **fields: Any) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in stub.Generate(Request(**fields))]


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    said = messages or ({"role": "user", "content": "hello"},)
    return {
        "chat": inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(**message) for message in said], **fields)
    }


def test_no_field_of_rest_was_forgotten() -> None:
    rest = {*ChatCompletionBody.model_fields, *CompletionBody.model_fields}
    assert rest - set(Request.DESCRIPTOR.fields_by_name) == set(OTHERWISE)


async def test_the_newer_fields_reach_the_sampler(stub: Any, gateway: Gateway) -> None:
    await generate(stub, text="hello", logit_bias={5: 2.0, 7: -500.0}, priority=3, session_id="s", max_tokens=4)
    sampling = gateway.dispatcher.requests[0].sampling
    assert sampling.logit_bias == ((5, 2.0), (7, -100.0))
    assert gateway.dispatcher.requests[0].service_level(0.0).priority == 3


async def test_the_session_and_its_time_reach_the_workers(stub: Any, gateway: Gateway) -> None:
    await generate(stub, text="hello", session_id="s", session_ttl_s=9.0, max_tokens=4)
    await generate(stub, text="hello", max_tokens=4)
    sessions = [request.session for request in gateway.dispatcher.requests]
    assert sessions == [SessionTag("/s", 9.0), None]


async def test_stops_are_told_and_kept(stub: Any) -> None:
    responses = await generate(stub, text="x", max_tokens=32, stop=["brown"], include_stop_str_in_output=True)
    assert "".join(response.text for response in responses) == "the quick brown"
    assert responses[-1].stop_string == "brown"
    assert not responses[-1].HasField("stop_token_id")


async def test_special_tokens_and_echo(stub: Any) -> None:
    responses = await generate(stub, text="hello world", echo=True, max_tokens=32)
    assert "".join(response.text for response in responses) == "hello world" + REPLY
    responses = await generate(stub, text="x", skip_special_tokens=False, max_tokens=32)
    assert "".join(response.text for response in responses) == REPLY + tiny_tokenizers.TURN_END


async def test_logprobs_of_the_prompt_come_with_the_first_piece(stub: Any, gateway: Gateway) -> None:
    responses = await generate(stub, text="hello world", prompt_logprobs=2, max_tokens=3)
    prompt = gateway.dispatcher.requests[0].prompt_token_ids
    assert [token.token_id for token in responses[0].prompt_tokens] == prompt
    assert not responses[0].prompt_tokens[0].top_logprobs
    assert all(len(token.top_logprobs) == 2 for token in responses[0].prompt_tokens[1:])
    assert not any(response.prompt_tokens for response in responses[1:])


@pytest.mark.parametrize(
    "output",
    [
        {"json_schema": '{"type": "object"}'}, {"json_object": True}, {"regex": "[0-9]+"}, {"grammar": 'start: "a"'},
        {"choice": inference_pb2.Choice(strings=["yes", "no"])},
    ],
    ids=lambda output: next(iter(output)),
)  # fmt: skip
async def test_constraints_reach_the_workers(stub: Any, gateway: Gateway, output: dict[str, Any]) -> None:
    for prompt in (chat(), {"text": "hello"}):
        await generate(stub, **prompt, **output, max_tokens=4)
        assert gateway.dispatcher.requests[-1].sampling.grammar


async def test_calls_come_as_deltas_and_results_go_back() -> None:
    gateway = make_gateway(tokenizer=ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=TOOL_TEMPLATE)))
    gateway.dispatcher.reply = f"Let me see. {CALL}"
    tools = [inference_pb2.Tool(**TOOL)]
    async with served(gateway) as stub:
        responses = await generate(stub, **chat(), tools=tools, max_tokens=200)
        assert "".join(response.text for response in responses).strip() == "Let me see."
        first, *later = [delta for response in responses for delta in response.tool_calls]
        assert (first.index, first.name) == (0, "weather")
        assert first.id
        assert not any(delta.id or delta.name for delta in later)
        arguments = "".join(delta.arguments for delta in (first, *later))
        assert json.loads(arguments) == {"city": "Ulm"}
        assert responses[-1].finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS
        call = inference_pb2.ToolCall(id=first.id, name="weather", arguments=arguments)
        turns = (
            {"role": "user", "content": "hello"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": first.id, "content": "rain"},
        )
        await generate(stub, **chat(*turns), tools=tools, max_tokens=4)
    prompt = gateway.deps.tokenizer.pieces.decode(
        gateway.dispatcher.requests[-1].prompt_token_ids, skip_special_tokens=False
    )
    assert '"city": "Ulm"' in prompt
    assert "rain" in prompt


async def test_a_last_message_is_gone_on_with(stub: Any, gateway: Gateway) -> None:
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"})
    await generate(stub, **chat(*turns, continue_final_message=True, add_generation_prompt=False), max_tokens=4)
    prompt = gateway.deps.tokenizer.pieces.decode(
        gateway.dispatcher.requests[-1].prompt_token_ids, skip_special_tokens=False
    )
    assert prompt.endswith("assistant\nThe answer")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": "x", "tools": [inference_pb2.Tool(**TOOL)]}, "tools needs a conversation"),
        ({"text": "x", "tool_choice": "auto"}, "tool_choice needs a conversation"),
        ({**chat(), "echo": True}, "echo is not for conversations"),
        ({**chat(), "tools": [inference_pb2.Tool(name="x", parameters="{")]}, "tools[0].parameters must be JSON"),
        ({**chat(), "tool_choice": "required"}, "tool_choice"),
        ({"text": "x", "regex": "("}, "regex"),
        ({"text": "x", "json_schema": "{"}, "json_schema"),
        ({"text": "x", "logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"text": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
        (chat({"role": "user", "tool_calls": [inference_pb2.ToolCall(name="y")]}), "chat.messages[0].tool_calls"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
async def test_what_is_wrong_is_named(stub: Any, gateway: Gateway, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await generate(stub, **fields)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().startswith(words)
    assert not gateway.dispatcher.requests
    assert await generate(stub, text="hello", max_tokens=2)
