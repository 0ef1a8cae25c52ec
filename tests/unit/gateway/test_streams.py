"""Over a real socket: disconnects in every phase, keep-alive, slow clients, and the openai client unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import orjson
import pytest
from helpers import tiny_tokenizers
from helpers.gateway_api import REPLY, Gateway, chat_body, completion_body, events_of, make_gateway
from helpers.waiting import eventually

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import SampledToken
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.app import create_app
from baton.services.gateway.generation import GenerationRequest
from baton.services.gateway.limits import Limits
from baton.services.gateway.tokenizer import ChatOptions, ModelTokenizer

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def raw_post(url: str, path: str, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """A request whose connection is simply dropped at the end."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    content = orjson.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.transport.abort()


@asynccontextmanager
async def streamed_chat(gateway: Gateway) -> AsyncIterator[httpx.Response]:
    """A stream that has begun."""
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(gateway.server())
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url))
        response = await stack.enter_async_context(client.stream("POST", CHAT, json=chat_body(stream=True)))
        assert response.status_code == 200
        yield response


def assert_released(gateway: Gateway) -> None:
    assert not gateway.dispatcher.running
    assert gateway.deps.door.num_inside == 0


# Disconnects.


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("phase", ["queued", "generating"])
async def test_a_client_that_goes_cancels_its_request(gateway: Gateway, phase: str, n: int, stream: bool) -> None:
    never = asyncio.Event()

    def script(request: GenerationRequest) -> list[Any]:
        return [never] if phase == "queued" else [*gateway.dispatcher.speak(request)[:2], never]

    gateway.dispatcher.script = script
    async with gateway.server() as url:
        async with raw_post(url, CHAT, chat_body(stream=stream, n=n)) as reader:
            expected = 1 if phase == "queued" else n
            await eventually(lambda: len(gateway.dispatcher.running) == expected)
            if phase == "generating" and stream:
                await reader.readuntil(b"data: ")
        await eventually(lambda: not gateway.dispatcher.running)
        await eventually(lambda: gateway.deps.door.num_inside == 0)
        gateway.dispatcher.script = gateway.dispatcher.speak
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post(CHAT, json=chat_body())).status_code == 200


class _WaitingTokenizer(ModelTokenizer):
    """Takes until ``release`` for a conversation."""

    def __init__(self) -> None:
        super().__init__(tiny_tokenizers.as_transformers())
        self.num_inside = 0
        self.release = asyncio.Event()

    async def encode_chat(self, messages: Sequence[Any], options: ChatOptions, *, max_tokens: int) -> list[int]:
        self.num_inside += 1
        try:
            await self.release.wait()
        finally:
            self.num_inside -= 1
        return await super().encode_chat(messages, options, max_tokens=max_tokens)


async def test_a_client_that_goes_while_its_prompt_is_tokenised_never_reaches_a_worker() -> None:
    tokenizer = _WaitingTokenizer()
    gateway = make_gateway(tokenizer=tokenizer)
    async with gateway.server() as url:
        async with raw_post(url, CHAT, chat_body(stream=True)):
            await eventually(lambda: tokenizer.num_inside == 1)
        await eventually(lambda: tokenizer.num_inside == 0)
        await eventually(lambda: gateway.deps.door.num_inside == 0)
    assert gateway.dispatcher.requests == []


async def test_a_stop_string_frees_the_workers_before_the_client_has_read_the_end(gateway: Gateway) -> None:
    never = asyncio.Event()
    gateway.dispatcher.script = lambda request: [*gateway.dispatcher.speak(request)[:-1], never]
    async with gateway.server() as url, httpx.AsyncClient(base_url=url) as client:
        response = await client.post(CHAT, json=chat_body(stream=True, stop="fox"))
        assert events_of(response.text)[-1]["choices"][0]["finish_reason"] == "stop"
    assert_released(gateway)


async def test_many_disconnects_leave_nothing_behind(gateway: Gateway) -> None:
    never = asyncio.Event()

    def script(request: GenerationRequest) -> list[Any]:
        index = len(gateway.dispatcher.requests) % 4
        return [*gateway.dispatcher.speak(request)[:index], never]

    gateway.dispatcher.script = script
    async with gateway.server() as url:
        num_tasks = len(asyncio.all_tasks())

        async def come_and_go(i: int) -> None:
            async with raw_post(url, CHAT, chat_body(stream=i % 2 == 0, n=1 + i % 3)):
                await eventually(lambda: len(gateway.dispatcher.requests) > i // 2)

        await asyncio.gather(*(come_and_go(i) for i in range(60)))
        await eventually(lambda: gateway.deps.door.num_inside == 0)
        await eventually(lambda: len(asyncio.all_tasks()) <= num_tasks)
    assert_released(gateway)


# Keep-alive and failures.


async def test_a_waiting_stream_gets_comments_and_then_its_answer() -> None:
    gateway = make_gateway(limits=Limits(keepalive_s=0.05))
    ready = asyncio.Event()
    gateway.dispatcher.script = lambda request: [ready, *gateway.dispatcher.speak(request)]
    async with streamed_chat(gateway) as response:
        lines = response.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        assert await anext(lines) == ""
        assert await anext(lines) == ": keep-alive"
        ready.set()
        rest = [line async for line in lines]
    assert rest[-2] == "data: [DONE]"
    assert sum(REPLY.split()[0] in line for line in rest) == 1


async def test_a_failure_behind_a_comment_is_an_event() -> None:
    gateway = make_gateway(limits=Limits(keepalive_s=0.05))
    ready = asyncio.Event()
    gateway.dispatcher.script = lambda request: [ready, BatonError(ErrorCode.NO_WORKERS, "none")]
    async with streamed_chat(gateway) as response:
        text = ""
        async for part in response.aiter_text():
            text += part
            if ": keep-alive" in text:
                ready.set()
    events = events_of(text)
    assert len(events) == 1
    assert events[0]["error"]["code"] == "no_workers"


async def test_no_comments_while_tokens_flow(gateway: Gateway) -> None:
    async with gateway.server() as url, httpx.AsyncClient(base_url=url) as client:
        assert ": keep-alive" not in (await client.post(CHAT, json=chat_body(stream=True))).text


# Slow clients.


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_does_not_end_is_given_up(chunked: bool) -> None:
    gateway = make_gateway(limits=Limits(body_timeout_s=0.1))
    length = "transfer-encoding: chunked" if chunked else "content-length: 100"
    async with gateway.server() as url:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{length}\r\n\r\n".encode())
        writer.write(b"1\r\n{\r\n" if chunked else b"{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        answer = await reader.read()
        assert b'"request_timeout"' in answer
        writer.close()
        await writer.wait_closed()
    assert_released(gateway)


async def test_a_slow_reader_stalls_only_its_own_stream(gateway: Gateway) -> None:
    """When the server cannot send, no more tokens are taken for that stream; others are served, and it can be cancelled."""
    num_taken = 0
    token = SampledToken(gateway.dispatcher.encode("the")[0])

    def script(request: GenerationRequest) -> Any:
        nonlocal num_taken
        if len(gateway.dispatcher.requests) > 1:
            yield from gateway.dispatcher.speak(request)
            return
        while True:
            yield TokenDelta(num_taken, (token,))
            num_taken += 1

    gateway.dispatcher.script = script
    gone, is_stuck = asyncio.Event(), asyncio.Event()
    messages = iter([{"type": "http.request", "body": orjson.dumps(completion_body(stream=True)), "more_body": False}])

    async def receive() -> Any:
        if (message := next(messages, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            is_stuck.set()
            await asyncio.Event().wait()

    path = "/v1/completions"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "headers": [],
        "query_string": b"",
    }
    app = create_app(gateway.deps)
    task = asyncio.ensure_future(app(scope, receive, send))
    await is_stuck.wait()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        for _ in range(3):
            assert (await client.post(CHAT, json=chat_body(stream=True))).status_code == 200
    assert num_taken <= 1
    gone.set()
    await task
    assert_released(gateway)


async def test_health_answers_while_a_large_prompt_is_tokenised(gateway: Gateway) -> None:
    """Were the event loop or the interpreter lock held, there would be one answer before and one after."""
    text = "the quick brown fox jumps over the lazy dog 🙂 " * 5_000
    async with gateway.server() as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        task = asyncio.create_task(client.post("/tokenize", json={"prompt": text}))
        num_answers = 0
        while not task.done():
            assert (await client.get("/health")).status_code == 200
            num_answers += 1
        assert (await task).json()["count"] > 25_000
    assert num_answers > 5


# The openai client.


@pytest.fixture
async def openai_client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        gateway.server() as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


async def test_openai_chat_choices_stop_logprobs_usage(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, stop=["fox"], logprobs=True, top_logprobs=2, seed=1, max_tokens=20
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.message.content == "the quick brown "
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None


async def test_openai_chat_stream(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == REPLY
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


async def test_openai_completions_models_and_errors(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[2].text == "b" + REPLY
    assert answer.choices[0].logprobs is not None
    assert [model.id async for model in openai_client.models.list()] == ["tiny", "tiny-alias"]
    with pytest.raises(openai.NotFoundError) as missing:
        await openai_client.chat.completions.create(model="other", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        await openai_client.completions.create(model="tiny", prompt="fox " * 1000)
    assert too_long.value.code == "context_length_exceeded"
