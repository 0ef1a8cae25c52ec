"""POST /v1/completions: prompts of every kind, echo, logprobs."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from helpers.gateway_api import MAX_MODEL_LEN, REPLY, Gateway, completion_body, events_of

from baton.services.core.request import FinishReason, SampledToken
from baton.services.core.token_order import TokenDelta


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=completion_body(**fields))
    assert response.status_code == 200, response.text
    return dict(response.json())


async def complete_stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post("/v1/completions", json=completion_body(stream=True, **fields))
    assert response.status_code == 200, response.text
    return events_of(response.text)


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The single choice of a stream, put together."""
    choice: dict[str, Any] = {"text": "", "finish_reason": None, "logprobs": None}
    for part in (c for event in events for c in event["choices"]):
        choice["text"] += part["text"]
        choice["finish_reason"] = part["finish_reason"]
        if part["logprobs"]:
            so_far = choice["logprobs"] or {name: [] for name in part["logprobs"]}
            choice["logprobs"] = {name: so_far[name] + values for name, values in part["logprobs"].items()}
    return choice


async def test_whole_answer_has_the_openai_shape(client: httpx.AsyncClient) -> None:
    answer = await complete(client)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    choice = answer["choices"][0]
    assert (choice["index"], choice["text"], choice["finish_reason"], choice["logprobs"]) == (0, REPLY, "stop", None)


async def test_stream_joins_to_the_whole_answer(client: httpx.AsyncClient) -> None:
    events = await complete_stream(client, stream_options={"include_usage": True})
    whole = await complete(client)
    assert joined(events)["text"] == whole["choices"][0]["text"]
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], whole["usage"])
    assert all(event["usage"] is None for event in events[:-1])


async def test_tokens_that_came_together_leave_in_events_of_their_own(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    ids = gateway.dispatcher.encode(REPLY)
    tokens = [SampledToken(token_id) for token_id in ids]
    gateway.dispatcher.script = lambda request: [
        TokenDelta(0, tuple(tokens[:1])),
        TokenDelta(1, tuple(tokens[1:])),
        TokenDelta(len(ids), (), FinishReason.LENGTH),
    ]
    events = await complete_stream(client, max_tokens=len(ids))
    assert joined(events) == {"text": REPLY, "finish_reason": "length", "logprobs": None}
    texts = [event["choices"][0]["text"] for event in events]
    assert len([text for text in texts if text]) == len(ids)
    with_stop = joined(await complete_stream(client, max_tokens=len(ids), stop="brown"))
    assert (with_stop["text"], with_stop["finish_reason"]) == (REPLY.partition("brown")[0], "stop")


async def test_default_is_sixteen_tokens_or_what_is_left(client: httpx.AsyncClient, gateway: Gateway) -> None:
    await complete(client, max_tokens=None)
    await complete(client, max_tokens=None, prompt=[5] * (MAX_MODEL_LEN - 3))
    assert [request.sampling.max_tokens for request in gateway.dispatcher.requests] == [16, 3]


async def test_token_ids_are_taken_as_they_are(client: httpx.AsyncClient, gateway: Gateway) -> None:
    ids = gateway.dispatcher.encode("hello world")
    await complete(client, prompt="hello world")
    await complete(client, prompt=ids)
    first, second = gateway.dispatcher.requests
    assert first.prompt_token_ids == second.prompt_token_ids == ids


async def test_prompts_times_choices_in_order(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.dispatcher.cached_tokens = 2
    prompts = ["hello", "world wide", "fox"]
    answer = await complete(client, prompt=prompts, n=2, echo=True, max_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for i, prompt in enumerate(prompts):
        assert all(answer["choices"][2 * i + j]["text"].startswith(prompt) for j in range(2))
    lengths = [len(gateway.dispatcher.encode(prompt)) for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * len(prompts)


async def test_one_seed_gives_each_prompt_of_a_list_what_it_gives_alone(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    await complete(client, prompt=["hello", "fox"], n=2, seed=-7)
    by_id = {request.request_id.rpartition(".")[2]: request.sampling.seed for request in gateway.dispatcher.requests}
    assert by_id["0"] == by_id["2"] == 2**64 - 7
    assert by_id["1"] == by_id["3"] != by_id["0"]


async def test_without_a_seed_answers_differ(client: httpx.AsyncClient, gateway: Gateway) -> None:
    for seed in (None, -1):
        await complete(client, seed=seed)
    assert len({request.sampling.seed for request in gateway.dispatcher.requests}) == 2


async def test_echo_puts_the_prompt_first(client: httpx.AsyncClient) -> None:
    assert (await complete(client, echo=True))["choices"][0]["text"] == "hello world" + REPLY
    assert joined(await complete_stream(client, echo=True))["text"] == "hello world" + REPLY


async def test_echo_alone_needs_no_worker(client: httpx.AsyncClient, gateway: Gateway) -> None:
    answer = await complete(client, echo=True, max_tokens=0, n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["hello world"] * 2
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert joined(await complete_stream(client, echo=True, max_tokens=0))["text"] == "hello world"
    assert gateway.dispatcher.requests == []


async def test_scoring_a_prompt(client: httpx.AsyncClient, gateway: Gateway) -> None:
    """echo, logprobs and no new tokens: what evaluation harnesses send."""
    answer = await complete(client, prompt="Grüße hello", echo=True, max_tokens=0, logprobs=2, n=2)
    assert len(gateway.dispatcher.requests) == 1
    request = gateway.dispatcher.requests[0]
    assert (request.sampling.num_prompt_logprobs, request.sampling.max_tokens) == (2, 1)
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        assert choice["text"] == "Grüße hello"
        assert {len(values) for values in logprobs.values()} == {len(request.prompt_token_ids)}
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        assert None not in logprobs["token_logprobs"][1:]
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("echo", [False, True])
async def test_logprobs_lists_agree_with_each_other_and_with_the_stream(
    client: httpx.AsyncClient, gateway: Gateway, echo: bool
) -> None:
    gateway.dispatcher.reply = " jumps over Köln"
    fields: dict[str, Any] = {"logprobs": 3, "echo": echo, "prompt": "the fox"}
    choice = (await complete(client, **fields))["choices"][0]
    logprobs = choice["logprobs"]
    prompt_length = len(gateway.dispatcher.encode("the fox")) if echo else 0
    output_length = len(gateway.dispatcher.encode(gateway.dispatcher.reply)) + 1
    assert {len(values) for values in logprobs.values()} == {prompt_length + output_length}
    for text, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not text.startswith(("bytes:", "<|")):
            assert choice["text"][offset:].startswith(text)
    for own, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top is None or len(top) in (3, 4)
        assert own is None or max(top.values()) == own
    assert joined(await complete_stream(client, **fields))["logprobs"] == logprobs


async def test_zero_logprobs_report_the_token_itself(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=0))["choices"][0]["logprobs"]
    assert all(len(top) == 1 for top in logprobs["top_logprobs"])


async def test_prompt_logprobs_have_their_own_field(client: httpx.AsyncClient, gateway: Gateway) -> None:
    answer = await complete(client, prompt_logprobs=1)
    entries = answer["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert entries[1][str(gateway.dispatcher.requests[0].prompt_token_ids[1])]["rank"] == 1
    assert answer["choices"][0]["logprobs"] is None


async def test_tokens_ending_the_prompt_inside_a_character(client: httpx.AsyncClient, gateway: Gateway) -> None:
    """Nothing of the prompt appears in the answer; with echo, the character that they make together does."""
    parrot = gateway.dispatcher.encode("🦜")
    assert len(parrot) > 1
    gateway.dispatcher.reply = "fox"
    prompt = [*gateway.dispatcher.encode("a"), *parrot[:-1]]
    assert (await complete(client, prompt=prompt))["choices"][0]["text"] == "fox"
    echoed = await complete(client, prompt=[*gateway.dispatcher.encode("a"), *parrot], echo=True)
    assert echoed["choices"][0]["text"] == "a🦜fox"


async def test_token_ids_on_request(client: httpx.AsyncClient, gateway: Gateway) -> None:
    choice = (await complete(client, return_token_ids=True))["choices"][0]
    events = await complete_stream(client, return_token_ids=True)
    assert choice["prompt_token_ids"] == gateway.dispatcher.encode("hello world")
    assert events[0]["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]
    assert [i for event in events for i in event["choices"][0]["token_ids"]] == choice["token_ids"]


async def test_exactly_max_tokens_with_ignore_eos(client: httpx.AsyncClient, gateway: Gateway) -> None:
    answer = await complete(client, ignore_eos=True, max_tokens=30)
    assert answer["usage"]["completion_tokens"] == 30
    assert answer["choices"][0]["finish_reason"] == "length"
    assert gateway.dispatcher.requests[0].sampling.ignore_eos
