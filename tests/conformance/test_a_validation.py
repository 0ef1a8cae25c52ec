"""A. Validation and errors. Every refusal is followed by a good request, which is what behaviour 35 asks of all of them."""

from __future__ import annotations

import json
import math
import socket
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from conformance.conftest import Owned
from helpers.api_client import CHAT, COMPLETIONS, MESSAGES, PROMPT, Api, error_of
from helpers.waiting import eventually_sync

BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
NUMBER_TOO_LARGE = 2**63


def value_id(value: Any) -> str:
    return str(value)[:20]


def cases(*pairs: tuple[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "value"), pairs, ids=value_id)


@BOTH
@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"model": ', b"\xff\xfe", b"[" * 5000], ids=["empty", "brace", "cut", "bytes", "deep"]
)
def test_b001_malformed_json(api: Api, path: str, raw: bytes) -> None:
    error_of(api.post(path, raw=raw))
    api.still_serves()


@BOTH
@pytest.mark.parametrize("raw", [b"[]", b'["a"]', b'"text"', b"5", b"null", b"true"], ids=lambda raw: raw.decode())
def test_b002_a_body_that_is_no_object(api: Api, path: str, raw: bytes) -> None:
    error_of(api.post(path, raw=raw))
    api.still_serves()


@BOTH
@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_b003_another_content_type(api: Api, path: str, content_type: str) -> None:
    error_of(api.post(path, raw=b"model=a&prompt=b", content_type=content_type), (400, 415, 422))
    api.still_serves()


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
def test_b004_a_missing_prompt_is_named(api: Api, path: str, field: str) -> None:
    error = error_of(api.post(path, api.body(path, **{field: ...})))
    assert error["param"] == field
    assert "body" not in str(error["param"])
    api.still_serves()


@BOTH
def test_b005_an_unknown_model_is_not_found_and_none_is_the_served_one(api: Api, path: str) -> None:
    error = error_of(api.post(path, api.body(path, model="no-such-model")), (404,))
    assert error["param"] == "model"
    assert "no-such-model" in error["message"]
    assert api.ask(path, model=...)["choices"]


def test_b006_unknown_routes_and_methods(api: Api) -> None:
    error_of(api.get("/v1/nowhere"), (404,))
    error_of(api.post("/v1/nowhere", {}), (404,))
    error_of(api.get(CHAT), (405,))
    error_of(api.http.delete(api.url + COMPLETIONS, headers=api.headers), (405,))
    api.still_serves()


def test_b007_unknown_fields_are_ignored(api: Api) -> None:
    plain = api.chat()["choices"][0]["message"]["content"]
    messages = [MESSAGES[0] | {"mood": "good", "weight": 3}]
    answer = api.chat(messages=messages, a_field_of_tomorrow={"a": [1]}, another="x")
    assert answer["choices"][0]["message"]["content"] == plain


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_b008_a_prompt_over_the_context_length_is_refused_before_the_stream(api: Api, stream: bool) -> None:
    limit = api.context_length()
    token = api.tokenize(PROMPT)[0]
    too_long = {
        COMPLETIONS: {"prompt": [token] * (limit + 7)},
        CHAT: {"messages": [{"role": "user", "content": f"{PROMPT} " * limit}]},
    }
    for path, fields in too_long.items():
        error = error_of(api.post(path, api.body(path, stream=stream, **fields)))
        assert str(limit) in error["message"]
        assert error["code"] == "context_length_exceeded" or "maximum context length" in error["message"]
    assert str(limit + 7) in error_of(api.post(COMPLETIONS, api.body(COMPLETIONS, **too_long[COMPLETIONS])))["message"]
    api.still_serves()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@BOTH
def test_b009_prompt_and_max_tokens_over_the_context_length(api: Api, path: str, stream: bool) -> None:
    limit = api.context_length()
    message = api.refuses(path, max_tokens=limit, stream=stream)
    assert str(limit) in message


def test_b009_without_max_tokens_what_is_left_is_filled(api: Api) -> None:
    limit = api.context_length()
    message = {"role": "user", "content": PROMPT}
    while True:  # as long a conversation as leaves a little room
        room = limit - api.chat(messages=[message], max_tokens=1)["usage"]["prompt_tokens"]
        if room < 64:
            break
        message["content"] += " fox" * max(1, (room - 32) // 2)
    answer = api.chat(messages=[message], max_tokens=..., ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == limit


def test_b010_max_tokens_zero(api: Api) -> None:
    api.refuses(CHAT, max_tokens=0)
    api.refuses(COMPLETIONS, max_tokens=0)
    echoed = api.complete(max_tokens=0, echo=True)
    assert echoed["choices"][0]["text"] == PROMPT
    assert echoed["usage"]["completion_tokens"] == 0


@BOTH
def test_b011_negative_max_tokens(api: Api, path: str) -> None:
    api.refuses(path, max_tokens=-1, param="max_tokens")


@BOTH
@pytest.mark.parametrize("n", [0, -1, 10**6])
def test_b012_n_out_of_range(api: Api, path: str, n: int) -> None:
    api.refuses(path, n=n, param="n")


@BOTH
def test_b013_several_greedy_choices_are_refused_or_equal(api: Api, path: str) -> None:
    response = api.post(path, api.body(path, n=2))
    if response.status_code != 200:
        error_of(response)
        return
    first, second = ({key: choice[key] for key in choice if key != "index"} for choice in response.json()["choices"])
    assert first == second


@BOTH
@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf, "abc", 2.5], ids=value_id)
def test_b014_temperature_out_of_range(api: Api, path: str, temperature: Any) -> None:
    error = error_of(api.post(path, api.body(path, temperature=temperature)))
    if not (isinstance(temperature, float) and not math.isfinite(temperature)):  # those are no JSON to begin with
        assert error["param"] == "temperature"
    api.still_serves()


@BOTH
def test_b014_a_tiny_temperature_is_served(api: Api, path: str) -> None:
    assert api.ask(path, temperature=1e-6, seed=1)["choices"]


@BOTH
@cases(
    ("top_p", 0),
    ("top_p", -0.5),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", "5"),
    ("min_p", -0.1),
    ("min_p", 1.1),
)
def test_b015_top_p_top_k_min_p_out_of_range(api: Api, path: str, name: str, value: Any) -> None:
    api.refuses(path, param=name, **{name: value})


@BOTH
def test_b015_top_k_zero_and_minus_one_are_off(api: Api, path: str) -> None:
    for top_k in (0, -1):
        assert api.ask(path, top_k=top_k)["choices"]


@BOTH
@cases(
    *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, "x")),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", "inf"),
)  # fmt: skip
def test_b016_penalties_out_of_range(api: Api, path: str, name: str, value: Any) -> None:
    api.refuses(path, param=name, **{name: value})


@BOTH
def test_b017_seeds(api: Api, path: str) -> None:
    for seed in (NUMBER_TOO_LARGE, -NUMBER_TOO_LARGE - 1):
        api.refuses(path, seed=seed)
    assert api.ask(path, seed=-1)["choices"]
    assert api.ask(path, seed=NUMBER_TOO_LARGE - 1)["choices"]


@BOTH
@cases(("stop", ""), ("stop", ["a", ""]), ("min_tokens", -1), ("min_tokens", 13))
def test_b018_stop_and_min_tokens(api: Api, path: str, name: str, value: Any) -> None:
    api.refuses(path, **{name: value})


@pytest.mark.parametrize(
    "fields",
    [{"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}, {"logprobs": False, "top_logprobs": 2},
     {"logprobs": True, "top_logprobs": "five"}],
    ids=value_id,
)  # fmt: skip
def test_b019_top_logprobs(api: Api, fields: dict[str, Any]) -> None:
    api.refuses(CHAT, **fields)


def test_b020_logprobs_of_completions(api: Api) -> None:
    api.refuses(COMPLETIONS, logprobs=21)
    api.refuses(COMPLETIONS, prompt_logprobs=1, stream=True)


@BOTH
def test_b021_logit_bias(api: Api, path: str) -> None:
    assert "door" in api.refuses(path, logit_bias={"door": 1})
    api.refuses(path, logit_bias={str(10**8): 1})
    token = str(api.tokenize(" fox")[-1])
    clamped, most = (api.ask(path, logit_bias={token: bias})["choices"][0] for bias in (1000, 100))
    assert clamped == most


def test_b022_token_ids_out_of_vocabulary(api: Api) -> None:
    for token_ids in ([10**8], [-1], [[5], [10**8]]):
        message = api.refuses(COMPLETIONS, prompt=token_ids)
        assert "vocab" in message.lower()


def test_b023_empty_prompts(api: Api) -> None:
    for prompt in ([], None, [[]]):
        api.refuses(COMPLETIONS, prompt=prompt)
    response = api.post(
        COMPLETIONS, api.body(COMPLETIONS, prompt="")
    )  # right where the model begins texts with a token
    assert response.status_code in (200, 400)
    api.refuses(CHAT, messages=[])


@BOTH
def test_b024_stream_options_without_a_stream(api: Api, path: str) -> None:
    api.refuses(path, stream_options={"include_usage": True})
    api.refuses(path, stream=False, stream_options={"include_usage": True})


def test_b029_continuing_a_message_excludes_a_generation_prompt(api: Api) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The code"}]
    api.refuses(CHAT, messages=messages, continue_final_message=True, add_generation_prompt=True)
    continued = api.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert continued["choices"][0]["message"]["content"]


@BOTH
@cases(("cache_salt", ""), ("cache_salt", 5), ("cache_salt", "s" * 2000), ("priority", "high"))
def test_b030_cache_salt_and_priority(api: Api, path: str, name: str, value: Any) -> None:
    api.refuses(path, **{name: value})


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic {key}", "{key}"])
def test_b031_keys(api: Api, header: str | None) -> None:
    if api.key is None:
        pytest.skip("the server needs no key")
    headers = {} if header is None else {"authorization": header.format(key=api.key)}
    for path in ("/v1/models", CHAT, COMPLETIONS):
        body = None if path == "/v1/models" else json.dumps(api.body(path))
        method = "GET" if body is None else "POST"
        response = httpx.request(
            method, api.url + path, content=body, headers=headers | {"content-type": "application/json"}
        )
        error_of(response, (401,))
        assert httpx.options(api.url + path, headers=headers).status_code != 401
    for path in ("/health", "/metrics", "/ping"):
        assert httpx.get(api.url + path, headers=headers).status_code == 200
    api.still_serves()


def test_b032_errors_are_short_and_do_not_repeat_the_input(api: Api) -> None:
    long = "q" * 3000
    bad: dict[str, Any] = {f"field{i}": long for i in range(5)}
    bad |= {
        "temperature": long,
        "top_p": long,
        "n": long,
        "seed": long,
        "max_tokens": long,
        "stop_token_ids": [long] * 500,
    }
    message = api.refuses(COMPLETIONS, **bad)
    assert len(message) < 2500
    assert long not in message


@BOTH
def test_b033_the_request_id_is_echoed_and_in_the_response_id(api: Api, path: str) -> None:
    response = api.post(path, api.body(path), x_request_id="my-own-id-7")
    assert response.status_code == 200
    if "x-request-id" not in response.headers:
        pytest.skip("the server does not echo x-request-id")
    assert response.headers["x-request-id"] == "my-own-id-7"
    assert response.json()["id"].endswith("-my-own-id-7")


def test_b034_over_the_limit_of_requests(api: Api, owned: Owned) -> None:
    """Requests count from their headers on, so that a refusal costs nothing: here none of them ever sends its body."""
    address = urlsplit(api.url)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: Bearer {api.key}\r\ncontent-length: 10\r\n\r\n"
    with ExitStack() as stack:
        refused: list[httpx.Response] = []

        def take_a_place() -> None:
            waiting = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=60.0))
            waiting.sendall(head.encode())

        def is_full() -> bool:
            # A good request that was served had a place, so that one of those that wait may have found none: another tries.
            take_a_place()
            response = api.post(COMPLETIONS, api.body(COMPLETIONS, max_tokens=1))
            refused.extend([response] if response.status_code != 200 else [])
            return bool(refused)

        for _ in range(owned.max_concurrent_requests - 1):
            take_a_place()
        eventually_sync(is_full, timeout_s=25.0, what="a server that is full")  # they are given up after 30 s
        error_of(refused[0], (503, 429))
        assert int(refused[0].headers["retry-after"]) >= 1
    eventually_sync(
        lambda: api.post(COMPLETIONS, api.body(COMPLETIONS)).status_code == 200, timeout_s=60.0, what="room"
    )


def test_b035_many_bad_requests_at_once_leave_the_server_usable(api: Api) -> None:
    bad = [
        api.body(COMPLETIONS, temperature=-1),
        api.body(COMPLETIONS, n=0),
        {"prompt": 5},
        {},
        api.body(COMPLETIONS, stop=""),
    ]
    for response in api.at_once(COMPLETIONS, bad * 6):
        error_of(response)
    api.still_serves()
