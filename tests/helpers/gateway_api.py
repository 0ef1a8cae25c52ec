"""The public API over a scripted dispatcher: what the workers say is written in the test."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from helpers import tiny_tokenizers
from tokenizers import Tokenizer

from baton.services.core.lifecycle import Instant
from baton.services.core.request import FinishReason, SampledToken, TokenLogprobs
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.app import create_app
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.generation import GenerationRequest
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.tokenizer import ModelTokenizer

MODEL = "tiny"
MAX_MODEL_LEN = 512
REPLY = "the quick brown fox"

Step = TokenDelta | Exception | asyncio.Event
Script = Callable[[GenerationRequest], Iterable[Step]]


class ScriptedDispatcher:
    """Plays what ``script`` returns for a request: yields deltas, raises exceptions, waits for events.

    The default answers with ``reply`` and the end-of-turn token, cut at max_tokens, as a worker would.
    """

    def __init__(self) -> None:
        self.reply = REPLY
        self.script: Script = self.speak
        self.requests: list[GenerationRequest] = []
        self.running: set[str] = set()
        self.finished: dict[str, str] = {}
        self.cached_tokens = 0

    def encode(self, text: str) -> list[int]:
        return list(_backend().encode(text, add_special_tokens=False).ids)

    def token(self, name: str) -> int:
        return int(_backend().token_to_id(name))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        try:
            for step in self.script(request):
                await asyncio.sleep(0)  # as a real one, which hears from workers
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    request.trace.mark(Instant.FIRST_TOKEN, 0.0)
                    yield step
        finally:
            self.running.discard(request.request_id)

    def finish(self, request: GenerationRequest, reason: str, num_tokens: int) -> None:
        self.finished[request.request_id] = reason

    def speak(self, request: GenerationRequest) -> list[Step]:
        """``reply``, one token a delta, and the end of the turn."""
        ids = [*self.encode(self.reply), self.token(tiny_tokenizers.TURN_END)]
        sampling = request.sampling
        if sampling.ignore_eos:
            ids = (ids[:-1] * sampling.max_tokens)[: sampling.max_tokens]
        ids = ids[: sampling.max_tokens]
        ending = sampling.ending_token_ids
        deltas: list[Step] = []
        for index, token_id in enumerate(ids):
            reason = FinishReason.STOP if token_id in ending else None
            if reason is None and index == sampling.max_tokens - 1:
                reason = FinishReason.LENGTH
            is_first = index == 0
            prompt = self._prompt_logprobs(request) if is_first else None
            stop_id = token_id if reason is FinishReason.STOP and token_id in sampling.stop_token_ids else None
            token = SampledToken(token_id, self.logprobs(token_id, sampling.num_logprobs))
            cached = self.cached_tokens if is_first else None
            deltas.append(TokenDelta(index, (token,), reason, stop_id, cached, prompt))
            if reason is FinishReason.STOP:
                break
        return deltas

    def logprobs(self, token_id: int, num: int | None) -> TokenLogprobs | None:
        """Made-up numbers: the token itself is the likeliest, its neighbours follow; the last one is impossible."""
        if num is None:
            return None
        top = [(token_id + i, -0.25 * (i + 1)) for i in range(num)]
        if num > 2:
            top[-1] = (top[-1][0], -math.inf)
        return TokenLogprobs(-0.25, tuple(top))

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[TokenLogprobs | None, ...] | None:
        num = request.sampling.num_prompt_logprobs
        if num is None:
            return None
        return (None, *(self.logprobs(token_id, num) for token_id in request.prompt_token_ids[1:]))


@dataclass
class Gateway:
    """Everything that a test may look at or change before it sends requests."""

    deps: GatewayDeps
    dispatcher: ScriptedDispatcher
    refusals: list[Any] = field(default_factory=list)
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @asynccontextmanager
    async def client(self, **kwargs: Any) -> AsyncIterator[httpx.AsyncClient]:
        """Requests without a socket."""
        transport = httpx.ASGITransport(create_app(self.deps))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", **kwargs) as client:
            yield client

    @asynccontextmanager
    async def server(self) -> AsyncIterator[str]:
        """The base URL of a real server on loopback."""
        config = uvicorn.Config(
            create_app(self.deps),
            host="127.0.0.1",
            port=0,
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
        server = _QuietServer(config)
        started = asyncio.Event()
        server.on_started = started.set
        task = asyncio.create_task(server.serve())
        waiter = asyncio.create_task(started.wait())
        await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
        assert started.is_set(), "the server did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await task


class _QuietServer(uvicorn.Server):
    on_started: Callable[[], None]

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@functools.cache
def _backend() -> Tokenizer:
    return tiny_tokenizers.load("byte_level")


@functools.cache
def _tokenizer() -> ModelTokenizer:
    return ModelTokenizer(tiny_tokenizers.as_transformers())


def make_gateway(**changes: Any) -> Gateway:
    """A gateway with the small byte-level tokenizer; ``changes`` replace fields of its GatewayDeps."""
    dispatcher = ScriptedDispatcher()
    backend = _backend()
    model = ServedModel(
        name=MODEL,
        aliases=("tiny-alias",),
        max_model_len=MAX_MODEL_LEN,
        vocab_size=backend.get_vocab_size(),
        eos_token_ids=frozenset(map(backend.token_to_id, (tiny_tokenizers.END_OF_TEXT, tiny_tokenizers.TURN_END))),
        created=1_700_000_000,
    )
    refusals: list[Any] = []
    receipts: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {
        "dispatcher": dispatcher,
        "tokenizer": _tokenizer(),
        "model": model,
        "ready": lambda: (True, ""),
        "metrics": lambda: b"baton_up 1\n",
        "workers": lambda: [{"id": "decode-0"}],
        "receipt": lambda receipt_id, whose: receipts.get(receipt_id),
        "on_refused": refusals.append,
    }
    return Gateway(GatewayDeps(**(settings | changes)), dispatcher, refusals, receipts)


def events_of(body: str) -> list[dict[str, Any]]:
    """The JSON events of a finished stream, which must be well formed and end with ``[DONE]``."""
    blocks = body.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    events = []
    for block in blocks[:-2]:
        assert block.startswith(("data: ", ": ")), block
        if block.startswith("data: "):
            events.append(json.loads(block.removeprefix("data: ")))
    return events


def chat_body(**fields: Any) -> dict[str, Any]:
    """A good chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 32} | fields


def completion_body(**fields: Any) -> dict[str, Any]:
    """A good completion request."""
    return {"model": MODEL, "prompt": "hello world", "max_tokens": 32} | fields


def prompt_of(gateway: Gateway) -> str:
    """The prompt of the newest request, as text with its special tokens."""
    return gateway.deps.tokenizer.pieces.decode(
        gateway.dispatcher.requests[-1].prompt_token_ids, skip_special_tokens=False
    )


def named_events(text: str) -> list[dict[str, Any]]:
    """The data of a stream whose events have their names twice: as the event's and as the data's type."""
    blocks = text.split("\n\n")
    assert blocks[-1] == ""
    events: list[dict[str, Any]] = []
    for block in blocks[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
