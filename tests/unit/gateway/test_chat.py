"""POST /v1/chat/completions: shapes, streaming, several choices, stops, logprobs."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import httpx
import pytest
from helpers.gateway_api import MAX_MODEL_LEN, REPLY, Gateway, chat_body, events_of
from helpers.tiny_tokenizers import TURN_END

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.lifecycle import Instant
from baton.services.core.request import FinishReason, SampledToken
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.generation import GenerationRequest


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json=chat_body(**fields))
    assert response.status_code == 200, response.text
    return dict(response.json())


async def chat_stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post("/v1/chat/completions", json=chat_body(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    deltas = [c["delta"] for event in events for c in event["choices"] if c["index"] == index]
    return "".join(delta.get("content") or "" for delta in deltas)


async def test_whole_answer_has_the_openai_shape(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.dispatcher.cached_tokens = 3
    answer = await chat(client)
    choice = answer["choices"][0]
    num_tokens = len(gateway.dispatcher.encode(REPLY)) + 1
    num_prompt = len(gateway.dispatcher.requests[0].prompt_token_ids)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert isinstance(answer["created"], int)
    assert choice["message"] == {"role": "assistant", "content": REPLY}
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "stop", None)
    assert choice["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_prompt_is_the_chat_template(client: httpx.AsyncClient, gateway: Gateway) -> None:
    await chat(client)
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert gateway.dispatcher.requests[0].prompt_token_ids == gateway.dispatcher.encode(expected)


async def test_content_parts_are_the_same_as_text(client: httpx.AsyncClient, gateway: Gateway) -> None:
    await chat(client)
    await chat(client, messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    first, second = gateway.dispatcher.requests
    assert first.prompt_token_ids == second.prompt_token_ids


async def test_final_message_can_be_continued(client: httpx.AsyncClient, gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick"}]
    await chat(client, messages=messages, continue_final_message=True)
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe quick"
    assert gateway.dispatcher.requests[0].prompt_token_ids == gateway.dispatcher.encode(expected)


async def test_stream_has_a_role_first_and_one_finish_reason_last(client: httpx.AsyncClient) -> None:
    events = await chat_stream(client)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == REPLY
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    assert events[0]["object"] == "chat.completion.chunk"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert all("role" not in event["choices"][0]["delta"] for event in events[1:])
    assert all("usage" not in event for event in events)


@pytest.mark.parametrize("reply", ["", "👩‍👩‍👧 שלום\r\ne\u0301", 'a "quoted" \\ line\n', '"content":""'])
async def test_stream_and_whole_answer_have_the_same_text(
    client: httpx.AsyncClient, gateway: Gateway, reply: str
) -> None:
    gateway.dispatcher.reply = reply
    assert text_of(await chat_stream(client, max_tokens=100)) == reply
    assert (await chat(client, max_tokens=100))["choices"][0]["message"]["content"] == reply


async def test_usage_comes_last_if_asked_for(client: httpx.AsyncClient) -> None:
    whole = await chat(client)
    events = await chat_stream(client, stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]


async def test_continuous_usage_grows_to_the_final_one(client: httpx.AsyncClient) -> None:
    events = await chat_stream(client, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-2] == counts[-1] > 1
    assert all(earlier < later for earlier, later in itertools.pairwise(counts[:-1]))


@pytest.mark.parametrize(
    ("max_tokens", "finish_reason"), [(3, "length"), (100, "stop")], ids=["cut by the limit", "ended by itself"]
)
async def test_finish_reason(client: httpx.AsyncClient, max_tokens: int, finish_reason: str) -> None:
    answer = await chat(client, max_tokens=max_tokens)
    assert answer["choices"][0]["finish_reason"] == finish_reason
    assert answer["usage"]["completion_tokens"] <= max_tokens


async def test_max_completion_tokens_wins_and_absence_fills_the_context(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    await chat(client, max_completion_tokens=5)
    await chat(client, max_tokens=None)
    first, second = gateway.dispatcher.requests
    assert first.sampling.max_tokens == 5
    assert second.sampling.max_tokens == MAX_MODEL_LEN - len(second.prompt_token_ids)


async def test_choices_have_one_prompt_and_their_own_seeds(client: httpx.AsyncClient, gateway: Gateway) -> None:
    for _ in range(2):
        answer = await chat(client, n=3, seed=42)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    first, second = gateway.dispatcher.requests[:3], gateway.dispatcher.requests[3:]
    seeds = [request.sampling.seed for request in first]
    assert seeds[0] == 42
    assert len(set(seeds)) == 3
    assert sorted(request.sampling.seed for request in second) == sorted(seeds)
    assert answer["usage"]["prompt_tokens"] == len(first[0].prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 3 * (len(gateway.dispatcher.encode(REPLY)) + 1)
    assert len({request.request_id for request in gateway.dispatcher.requests}) == 6


async def test_other_choices_start_behind_the_first_token_of_the_first(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    first_token = asyncio.Event()

    def script(request: GenerationRequest) -> list[Any]:
        is_leader = request.request_id.endswith(".0")
        return [first_token, *gateway.dispatcher.speak(request)] if is_leader else gateway.dispatcher.speak(request)

    gateway.dispatcher.script = script
    task = asyncio.create_task(chat(client, n=3))
    while not gateway.dispatcher.running:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(gateway.dispatcher.requests) == 1
    first_token.set()
    await task
    assert len(gateway.dispatcher.requests) == 3


async def test_streamed_choices_interleave_by_index(client: httpx.AsyncClient) -> None:
    events = await chat_stream(client, n=3)
    for index in range(3):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert text_of(events, index) == REPLY
        assert mine[0]["delta"]["role"] == "assistant"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("stop", "text", "matched"),
    [
        ("brown", "the quick ", "brown"),
        (["lazy", "k br"], "the quic", "k br"),
        (["the"], "", "the"),
        (["never"], REPLY, None),
        (["foxes"], REPLY, None),
    ],
)
async def test_stop_strings(
    client: httpx.AsyncClient, gateway: Gateway, stop: Any, text: str, matched: str | None
) -> None:
    whole = (await chat(client, stop=stop))["choices"][0]
    events = await chat_stream(client, stop=stop)
    assert whole["message"]["content"] == text_of(events) == text
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", matched)
    assert events[-1]["choices"][0]["stop_reason"] == matched
    assert not gateway.dispatcher.running
    assert list(gateway.dispatcher.finished.values()) == ["stop"] * (2 if matched else 0)


async def test_stop_string_can_be_kept(client: httpx.AsyncClient) -> None:
    answer = await chat(client, stop="brown", include_stop_str_in_output=True)
    assert answer["choices"][0]["message"]["content"] == "the quick brown"


async def test_min_tokens_lets_an_early_stop_string_pass(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.dispatcher.reply = "the quick the quick"
    min_tokens = len(gateway.dispatcher.encode("the quick"))
    answer = await chat(client, stop="the", min_tokens=min_tokens)
    assert answer["choices"][0]["message"]["content"] == "the quick "
    assert gateway.dispatcher.requests[0].sampling.min_tokens == min_tokens


async def test_stop_token_is_counted_and_named(client: httpx.AsyncClient, gateway: Gateway) -> None:
    ids = gateway.dispatcher.encode(REPLY)
    answer = await chat(client, stop_token_ids=[ids[2]])
    assert answer["choices"][0]["stop_reason"] == ids[2]
    assert answer["usage"]["completion_tokens"] == 3


async def test_special_tokens_are_shown_on_request(client: httpx.AsyncClient) -> None:
    answer = await chat(client, skip_special_tokens=False)
    assert answer["choices"][0]["message"]["content"] == REPLY + TURN_END


async def test_logprobs_have_an_entry_per_token_and_join_to_the_content(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    gateway.dispatcher.reply = "Grüße 🙂"
    answer = await chat(client, logprobs=True, top_logprobs=3)
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"]
    assert all(entry["logprob"] <= 0 for entry in entries)
    for entry in entries:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[-1] == -9999.0


async def test_logprobs_without_alternatives(client: httpx.AsyncClient) -> None:
    answer = await chat(client, logprobs=True)
    assert all(entry["top_logprobs"] == [] for entry in answer["choices"][0]["logprobs"]["content"])


async def test_streamed_logprobs_are_those_of_the_whole_answer(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.dispatcher.reply = "Grüße 🙂 fox"
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "stop": "zebra fox"}
    whole = (await chat(client, **fields))["choices"][0]["logprobs"]["content"]
    events = await chat_stream(client, **fields)
    lists = [(event["choices"][0]["logprobs"] or {"content": []})["content"] for event in events]
    assert [entry for part in lists for entry in part] == whole


async def test_token_ids_on_request(client: httpx.AsyncClient, gateway: Gateway) -> None:
    ids = [*gateway.dispatcher.encode(REPLY), gateway.dispatcher.token(TURN_END)]
    choice = (await chat(client, return_token_ids=True))["choices"][0]
    prompt = gateway.dispatcher.requests[0].prompt_token_ids
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, ids)
    events = await chat_stream(client, return_token_ids=True)
    assert events[0]["choices"][0]["prompt_token_ids"] == prompt
    assert [i for event in events for i in event["choices"][0]["token_ids"]] == ids


async def test_prompt_logprobs_begin_with_null(client: httpx.AsyncClient, gateway: Gateway) -> None:
    answer = await chat(client, prompt_logprobs=2)
    entries = answer["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == answer["usage"]["prompt_tokens"]
    prompt = gateway.dispatcher.requests[0].prompt_token_ids
    assert all(str(token_id) in entry for token_id, entry in zip(prompt[1:], entries[1:], strict=True))


async def test_failure_before_the_first_token_is_a_status(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.dispatcher.script = lambda request: [BatonError(ErrorCode.NO_WORKERS, "secret cause: 10.0.0.7")]
    for stream in (False, True):
        response = await client.post("/v1/chat/completions", json=chat_body(stream=stream))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "no_workers"
        assert "10.0.0.7" not in response.text


async def test_failure_in_a_stream_is_one_error_event_and_done(client: httpx.AsyncClient, gateway: Gateway) -> None:
    def script(request: GenerationRequest) -> list[Any]:
        return [*gateway.dispatcher.speak(request)[:2], RuntimeError("0xdeadbeef at /srv/x")]

    gateway.dispatcher.script = script
    events = await chat_stream(client)
    assert set(events[-1]) == {"error"}
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert "0x" not in json.dumps(events[-1])
    assert sum("error" in event for event in events) == 1


async def test_a_failing_choice_cancels_the_others(client: httpx.AsyncClient, gateway: Gateway) -> None:
    def script(request: GenerationRequest) -> list[Any]:
        steps = gateway.dispatcher.speak(request)
        if request.request_id.endswith(".1"):
            return [*steps[:1], BatonError(ErrorCode.WORKER_LOST, "gone")]
        return [*steps[:1], asyncio.Event()]

    gateway.dispatcher.script = script
    response = await client.post("/v1/chat/completions", json=chat_body(n=3))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
    assert not gateway.dispatcher.running


async def test_several_tokens_in_a_delta_stop_at_the_stop_string(client: httpx.AsyncClient, gateway: Gateway) -> None:
    ids = gateway.dispatcher.encode("the quick brown fox")

    def script(request: GenerationRequest) -> list[Any]:
        return [TokenDelta(0, tuple(map(SampledToken, ids)), FinishReason.LENGTH)]

    gateway.dispatcher.script = script
    answer = await chat(client, stop=" brown")
    assert answer["choices"][0]["message"]["content"] == "the quick"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < len(ids)


async def test_tokens_that_came_together_leave_in_events_of_their_own(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    tokens = [SampledToken(token_id) for token_id in gateway.dispatcher.encode(REPLY)]
    gateway.dispatcher.script = lambda request: [
        TokenDelta(0, tuple(tokens[:1])),
        TokenDelta(1, tuple(tokens[1:])),
        TokenDelta(len(tokens), (), FinishReason.LENGTH),
    ]
    response = await client.post("/v1/chat/completions", json=chat_body(stream=True, max_tokens=len(tokens)))
    contents = [event["choices"][0]["delta"].get("content") for event in events_of(response.text)]
    assert "".join(filter(None, contents)) == REPLY
    assert len(list(filter(None, contents))) == len(tokens)


async def test_a_gap_in_the_indices_is_an_error_not_an_answer(client: httpx.AsyncClient, gateway: Gateway) -> None:
    token = (SampledToken(gateway.dispatcher.encode("the")[0]),)
    gateway.dispatcher.script = lambda request: [TokenDelta(0, token), TokenDelta(2, token, FinishReason.STOP)]
    response = await client.post("/v1/chat/completions", json=chat_body())
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


async def test_instants_up_to_tokenized_are_marked_in_order(client: httpx.AsyncClient, gateway: Gateway) -> None:
    await chat(client, n=2)
    for request in gateway.dispatcher.requests:
        instants = [request.trace.at(i) for i in (Instant.RECEIVED, Instant.ADMITTED, Instant.TOKENIZED)]
        assert None not in instants
        assert instants == sorted(instants)
    first, second = gateway.dispatcher.requests
    assert first.trace is not second.trace
