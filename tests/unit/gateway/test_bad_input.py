"""Bad input: a 4xx that names what is wrong, in the one error shape, and the next request works."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from helpers.gateway_api import MAX_MODEL_LEN, Gateway, chat_body, completion_body, make_gateway

from baton.services.core.errors import ErrorCode
from baton.services.gateway.limits import Limits

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_INTERNALS = re.compile(r"0x[0-9a-f]{6,}|Traceback|\.py|pydantic|BaseModel|/work|/home|/usr")


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """As everywhere, and afterwards one good request must be answered."""
    async with gateway.client() as client:
        yield client
        assert not gateway.dispatcher.requests, "something reached the workers"
        assert (await client.post(CHAT, json=chat_body())).status_code == 200


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object of a response, after checking what holds for every one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = dict(body["error"])
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert len(response.text) < 2000
    assert not _INTERNALS.search(response.text)
    return error


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b'{"messages": [', b"[]", b'"text"', b"5", b"null", b'{"temperature": NaN}', b'{"temperature": 1e999}',
        b'{"prompt": "\\ud800"}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"\x00",
    ],
    ids=lambda raw: raw[:12].hex() or "empty",
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_what_is_not_a_json_object(client: httpx.AsyncClient, path: str, raw: bytes) -> None:
    response = await client.post(path, content=raw, headers={"content-type": "application/json"})
    assert error_of(response)["code"] == "invalid_request"


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data"])
async def test_other_content_types(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(CHAT, content=b"a=1", headers={"content-type": content_type})
    assert error_of(response, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (COMPLETIONS, "prompt"), ("/detokenize", "tokens")])
@pytest.mark.parametrize("body", [{}, {"messages": None, "prompt": None, "tokens": None}], ids=["absent", "null"])
async def test_missing_fields(client: httpx.AsyncClient, path: str, field: str, body: dict[str, Any]) -> None:
    assert error_of(await client.post(path, json=body))["param"] == field


BAD_FIELDS: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (-1, 1.5, "10", True, [], 2**63, 2**70)),
    *(("n", value) for value in (0, -1, 9, 10**6, "1", 1.0)),
    *(("temperature", value) for value in (-0.1, 2.1, 1e9, "abc", True)),
    *(("top_p", value) for value in (0, -1, 1.1, "1")),
    *(("top_k", value) for value in (-2, -5, 1.5, "4")),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("presence_penalty", value) for value in (-2.1, 2.1)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1)),
    *(("repetition_penalty", value) for value in (0, -1)),
    *(("seed", value) for value in (2**63, 2**70, -(2**63) - 1, "1", 0.5)),
    *(("stop", value) for value in ("", ["a", ""], ["x"] * 17, "y" * 1025, "z" * 10**6, 5, ["a", 5], {}, [None])),
    *(("stop_token_ids", value) for value in ([10**6], [-1], ["a"], 5, [1] * 129)),
    *(("min_tokens", value) for value in (-1, 33, "1")),
    *(("logit_bias", value) for value in ({"x": 1}, {"1.5": 1}, {"100000": 1}, {"-1": 1}, [1], {"1": "2"}, {" 1": 1})),
    *(("cache_salt", value) for value in ("", "s" * 1025, 5)),
    *(("session_id", value) for value in ("", "s" * 129, 5)),
    *(("priority", value) for value in (2**31, "high")),
    *(("prompt_logprobs", value) for value in (-1, 21, "1")),
    *(("stream", value) for value in (1, "true")),
    *(("stream_options", value) for value in ({"include_usage": True}, {}, 5)),
    *(("slo", value) for value in (5, [])),
    *(("model", value) for value in (5, ["tiny"])),
    *((name, value) for name in ("ignore_eos", "return_token_ids", "skip_special_tokens") for value in (1, "yes")),
    *((name, "x") for name in ("tool_choice", "parallel_tool_calls", "structured_outputs", "guided_regex")),
    *((name, "x") for name in ("reasoning_effort", "suffix")),
    *((name, ["x"]) for name in ("tools", "functions", "bad_words", "kv_transfer_params", "prompt_embeds")),
    ("tools", []),
    ("use_beam_search", True),
    ("chat_template", "{{ 1 }}"),
]  # fmt: skip


def case_id(value: Any) -> str:
    return str(value)[:24]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=case_id)
async def test_bad_fields_are_named(client: httpx.AsyncClient, name: str, value: Any) -> None:
    """Of both APIs, streaming or not, and never as a stream."""
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, completion_body())):
        for stream in (False, True):
            if stream and name.startswith("stream") and value in ({}, {"include_usage": True}):
                continue  # right in a stream
            content = orjson.dumps(body | {"stream": stream} | {name: _json_safe(value)})
            content = content.replace(b'"<big>"', str(value).encode())
            response = await client.post(path, content=content, headers={"content-type": "application/json"})
            error = error_of(response)
            assert error["param"] == name or error["param"].startswith((f"{name}.", f"{name}["))
            assert name in error["message"]
            assert error["type"] == "invalid_request_error"


def _json_safe(value: Any) -> Any:
    """orjson writes 64-bit integers only; others go in as text."""
    return "<big>" if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": 5, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
         "messages[0].tool_calls[0].function.name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": "5"}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"slo": {"class": "gold"}}, "slo.class"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms"),
        ({"slo": {"tpot_ms": -5}}, "slo.tpot_ms"),
        ({"slo": {"tpot_ms": "fast"}}, "slo.tpot_ms"),
    ],
    ids=case_id,
)  # fmt: skip
async def test_bad_chat_requests(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(await client.post(CHAT, json=chat_body(**fields)))["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(({"prompt": prompt}, "prompt") for prompt in
          ("", [], [[]], [""], {}, 5, True, [True], [1.5], ["a", 5], [5, "a"], [[1], "a"], [[1, "a"]], [None], ["x"] * 129)),
        *(({"prompt": prompt}, "prompt") for prompt in ([-1], [10**6], [[1], [10**9]], [2**63])),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 10**4}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"max_tokens": None, "min_tokens": 17}, "min_tokens"),
    ],
    ids=case_id,
)  # fmt: skip
async def test_bad_completion_requests(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(COMPLETIONS, json=completion_body(**fields)))
    assert error["param"] == param
    if fields.get("prompt") in ([-1], [10**6]):
        assert "out of vocabulary" in error["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "fox " * MAX_MODEL_LEN}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
        (CHAT, {"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 2**62}, "max_completion_tokens"),
        (COMPLETIONS, {"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * (MAX_MODEL_LEN + 1), "echo": True, "max_tokens": 0}, "prompt"),
        (COMPLETIONS, {"prompt": ["hello", "fox " * 1000]}, "prompt"),
        (COMPLETIONS, {"prompt": "x" * 10**6}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * (MAX_MODEL_LEN - 9), "max_tokens": 10}, "max_tokens"),
    ],
    ids=case_id,
)  # fmt: skip
async def test_too_long_for_the_context(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    body = chat_body(**fields) if path == CHAT else completion_body(**fields)
    error = error_of(await client.post(path, json=body | {"stream": stream}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in error["message"]


async def test_exactly_the_context_length_is_served(gateway: Gateway) -> None:
    async with gateway.client() as client:
        body = completion_body(prompt=[5] * (MAX_MODEL_LEN - 10), max_tokens=10)
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200


@pytest.mark.parametrize("name", ["gpt-5", "../../etc/passwd", "m" * 10_000, "tіny", "", "tiny "], ids=case_id)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize"])
async def test_unknown_model(client: httpx.AsyncClient, path: str, name: str) -> None:
    body = chat_body(model=name) if path == CHAT else completion_body(model=name)
    error = error_of(await client.post(path, json=body), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert name[:20] in error["message"]


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": "tiny-alias"}], ids=case_id)
async def test_no_model_and_an_alias_are_the_served_one(gateway: Gateway, fields: dict[str, Any]) -> None:
    body = {name: value for name, value in chat_body().items() if name != "model"} | fields
    async with gateway.client() as client:
        response = await client.post(CHAT, json=body)
    assert response.json()["model"] == (fields.get("model") or "tiny")
    assert gateway.dispatcher.requests[0].model == "tiny"


async def test_unknown_fields_nulls_and_odd_text_are_accepted(gateway: Gateway) -> None:
    nulls = dict.fromkeys(["temperature", "stop", "tools", "logit_bias", "stream_options", "slo", "response_format"])
    messages = [{"role": "user", "content": "a\x00b \U0010ffff", "mood": "good"}]
    body = chat_body(messages=messages, user="u", store=True, metadata={"a": 1}, whatever=[1], **nulls)
    async with gateway.client() as client:
        assert (await client.post(CHAT, json=body)).status_code == 200
        duplicate = b'{"messages": 5, "messages": [{"role": "user", "content": "x"}]}'
        response = await client.post(CHAT, content=duplicate, headers={"content-type": "application/json"})
        assert response.status_code == 200


async def test_many_problems_are_told_together_and_briefly(client: httpx.AsyncClient) -> None:
    fields: dict[str, Any] = {"temperature": "x" * 5000, "top_p": "y", "n": "z", "stop_token_ids": ["a"] * 5000}
    message = error_of(await client.post(CHAT, json=chat_body(**fields)))["message"]
    assert "temperature must be a number" in message
    assert "top_p must be a number" in message
    assert "xxx" not in message


async def test_body_over_the_limit() -> None:
    gateway = make_gateway(limits=Limits(max_body_bytes=1000))
    async with gateway.client() as client:
        fits = orjson.dumps(chat_body()).ljust(1000)
        headers = {"content-type": "application/json"}
        assert (await client.post(CHAT, content=fits, headers=headers)).status_code == 200
        assert error_of(await client.post(CHAT, content=fits + b" ", headers=headers), 413)["code"] == "body_too_large"

        async def unannounced() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 100

        error_of(await client.post(CHAT, content=unannounced(), headers=headers), 413)


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "tab\tx", "é"], ids=case_id)
async def test_bad_request_ids(client: httpx.AsyncClient, request_id: str) -> None:
    headers = {"x-request-id": request_id.encode("utf-8")}
    response = await client.post(CHAT, json=chat_body(), headers=headers)  # type: ignore[arg-type]
    assert error_of(response)["param"] == "x-request-id"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1" * 100], ids=case_id)
@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
async def test_bad_slo_headers(client: httpx.AsyncClient, header: str, value: str) -> None:
    response = await client.post(CHAT, json=chat_body(), headers={header: value})
    assert error_of(response)["param"] == header


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(await client.get("/" + "x" * 5000), 404)["code"] == "not_found"
    wrong_method = await client.get(CHAT)
    assert error_of(wrong_method, 405)["code"] == "method_not_allowed"
    assert wrong_method.headers["allow"] == "POST"
    assert error_of(await client.delete("/v1/models"), 405)["code"] == "method_not_allowed"


async def test_refusals_are_told_to_whoever_counts(gateway: Gateway) -> None:
    async with gateway.client() as client:
        body = chat_body(temperature=9, slo={"class": "batch"})
        response = await client.post(CHAT, json=body, headers={"x-request-id": "mine"})
    error_of(response)
    refusal = gateway.refusals[0]
    assert (refusal.receipt_id, refusal.code, refusal.slo.slo_class) == ("mine", ErrorCode.INVALID_REQUEST, "batch")
    assert len(gateway.refusals) == 1


async def test_no_chat_template() -> None:
    from helpers import tiny_tokenizers

    from baton.services.gateway.tokenizer import ModelTokenizer

    tokenizer = ModelTokenizer(tiny_tokenizers.as_transformers(chat_template=None))
    async with make_gateway(tokenizer=tokenizer).client() as client:
        assert error_of(await client.post(CHAT, json=chat_body()))["param"] == "messages"
        assert (await client.post(COMPLETIONS, json=completion_body())).status_code == 200
