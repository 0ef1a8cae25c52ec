"""Tokens that reach the client without waking the stream's reader: the same bytes, and the same ends, as on the longer way."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import pytest
from helpers import tiny_tokenizers
from helpers.dispatching import Dispatching, dispatching
from helpers.gateway_api import make_gateway
from helpers.scripted_worker import ScriptedWorker, silent
from helpers.waiting import eventually
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from baton.api.common.v1 import common_pb2 as pb
from baton.services.gateway.app import create_app
from baton.services.gateway.outlet import Outlet
from baton.services.gateway.sse import Cut

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
AWKWARD = '👩‍👩‍👧 e\u0301 "שלום"\r\n\tнет \\ 你好 \ufffd \x00 🇩🇪 the quick brown fox'
_ids = itertools.count()

Send = Callable[[bytes], Awaitable[None]]


async def _take_all(data: bytes) -> None:
    """A client that reads at once."""


class Talk:
    """The API before one worker, which says what the test says, when it says it."""

    def __init__(self, made: Dispatching, worker: ScriptedWorker) -> None:
        self.made = made
        self.worker = worker
        self.cut = Cut()
        self.gateway = make_gateway(dispatcher=made.dispatcher, cut=self.cut, wall_clock=lambda: 1_700_000_000.0)
        self.app = create_app(self.gateway.deps)
        self.written: list[bytes] = []  # past the reader

    @asynccontextmanager
    async def stream(
        self, path: str, body: dict[str, Any], on_data: Send = _take_all, *, name: str = ""
    ) -> AsyncIterator[Stream]:
        """A request that a worker has. The client goes at the end of the block, if it has not heard the end."""
        stream = Stream(self, name or f"s{next(_ids)}", on_data)
        num_starts = len(self.worker.starts)
        task = asyncio.ensure_future(stream.run(path, body | {"stream": True}))
        await eventually(lambda: len(self.worker.starts) > num_starts or task.done())
        assert not task.done(), stream.text
        stream.spec = self.worker.starts[-1].spec
        try:
            yield stream
        finally:
            stream.gone.set()
            await task


class Stream:
    spec: pb.GenerationSpec

    def __init__(self, talk: Talk, name: str, on_data: Send) -> None:
        self.name = name
        self.gone, self.over = asyncio.Event(), asyncio.Event()
        self.data = b""
        self._talk = talk
        self._on_data = on_data
        self._num_said = 0

    @property
    def text(self) -> str:
        return self.data.decode()

    async def run(self, path: str, body: dict[str, Any]) -> None:
        content = orjson.dumps(body)
        messages = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def receive() -> Any:
            if (message := next(messages, None)) is not None:
                return message
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await self._on_data(message["body"])
                self.data += message["body"]
                if not message.get("more_body"):
                    self.over.set()

        headers = [(b"content-type", b"application/json"), (b"x-request-id", self.name.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        await self._talk.app({**scope, "headers": headers}, receive, send)

    def say(self, *token_ids: int, **fields: Any) -> None:
        if self._num_said == 0:
            fields["prefill"] = pb.PrefillReport()
        self._talk.worker.say(self.spec, self._num_said, *token_ids, **fields)
        self._num_said += len(token_ids)

    async def taken(self) -> None:
        """All that was said has been taken from the worker's link."""
        await eventually(lambda: self.num_tokens == self._num_said, timeout_s=30)

    @property
    def num_tokens(self) -> Any:
        """As the receipt has it."""
        receipt: Any = self._talk.made.receipts.get(self.name)
        return receipt["completion_tokens"]


@asynccontextmanager
async def talking() -> AsyncIterator[Talk]:
    async with dispatching((), (silent,)) as (made, _, (worker,)):
        talk = Talk(made, worker)
        try:
            yield talk
            await eventually(lambda: made.dispatcher.num_running == 0)
            assert talk.gateway.deps.door.num_inside == 0
            made.assert_done()
        finally:
            talk.gateway.deps.grammars.close()


@pytest.fixture
async def talk(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Talk]:
    async with talking() as talk:
        _note_writes(monkeypatch, talk)
        yield talk


def _note_writes(patch: pytest.MonkeyPatch, talk: Talk) -> None:
    write = Outlet.write

    def noting(self: Outlet, data: bytes) -> None:
        talk.written.append(data)
        write(self, data)

    patch.setattr(Outlet, "write", noting)


def body_for(path: str, num_tokens: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    if path == COMPLETIONS:
        return {"prompt": "hello", "max_tokens": num_tokens} | fields
    if path == RESPONSES:
        return {"input": "hello", "max_output_tokens": max(16, num_tokens)}
    if path == MESSAGES:
        return {"model": "tiny", "messages": messages, "max_tokens": num_tokens}
    return {"messages": messages, "max_tokens": num_tokens} | fields


@functools.cache
def encode(text: str) -> list[int]:
    return list(tiny_tokenizers.load("byte_level").encode(text, add_special_tokens=False).ids)


# The same bytes.


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[asyncio.Runner, Talk]]:
    """One worker for all examples."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        talk = runner.run(stack.enter_async_context(talking()))
        try:
            yield runner, talk
        finally:
            runner.run(stack.aclose())


async def _told(talk: Talk, path: str, body: dict[str, Any], cuts: list[list[int]], ending: dict[str, Any]) -> bytes:
    async with talk.stream(path, body, name="same") as stream:
        for cut in cuts[:-1]:
            stream.say(*cut)
            await stream.taken()
        stream.say(*cuts[-1], **ending)
        await asyncio.wait_for(stream.over.wait(), 30)
    assert stream.num_tokens == sum(map(len, cuts))
    return stream.data


ENDINGS = [{"finish_reason": pb.FINISH_REASON_LENGTH}, {"finish_reason": pb.FINISH_REASON_STOP}]
FIELDS = [
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"return_token_ids": True},
    {"skip_special_tokens": False},
]


@given(
    path=st.sampled_from([CHAT, COMPLETIONS, RESPONSES, MESSAGES]),
    text=st.text(st.characters(exclude_categories=("Cs",)), min_size=4, max_size=20),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    fields=st.sampled_from(FIELDS),
    ending=st.sampled_from(ENDINGS),
)
@example(path=CHAT, text=AWKWARD, sizes=[1] * 8, fields={}, ending=ENDINGS[0])
@example(path=COMPLETIONS, text=AWKWARD, sizes=[3] * 8, fields={"echo": True}, ending=ENDINGS[1])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_both_ways_send_the_same_bytes(
    running: tuple[asyncio.Runner, Talk],
    path: str,
    text: str,
    sizes: list[int],
    fields: dict[str, Any],
    ending: dict[str, Any],
) -> None:
    """Whatever the API, its options, the text and where it is cut."""
    runner, talk = running
    token_ids = iter(encode(text))
    cuts = [cut for size in [1, *sizes, 1000] if (cut := list(itertools.islice(token_ids, size)))]
    body = body_for(path, sum(map(len, cuts)), **fields)
    talk.written.clear()
    with pytest.MonkeyPatch.context() as patch:
        _note_writes(patch, talk)
        shorter = runner.run(_told(talk, path, body, cuts, ending))
        num_written = len(talk.written)
        patch.setattr(Outlet, "open", lambda self: None)
        longer = runner.run(_told(talk, path, body, cuts, ending))
    assert _known(shorter) == _known(longer)
    assert len(talk.written) == num_written, "the longer way was not taken"
    if text == AWKWARD:
        assert num_written > 3, "the shorter way was not taken"


def _known(data: bytes) -> bytes:
    """Without the names that are drawn for the items of a response."""
    return re.sub(rb'"(msg|rs|fc)_[0-9a-f]{8,}"', b'"item"', data)


# The same ends.


async def test_a_client_that_goes_in_the_middle_cancels(talk: Talk) -> None:
    async with talk.stream(CHAT, body_for(CHAT, 100)) as stream:
        for token_id in encode("the quick brown fox"):
            stream.say(token_id)
            await stream.taken()
        assert talk.written
    await eventually(lambda: talk.worker.cancels == [(stream.spec.request_id, 1)])
    assert [record.outcome for record in talk.made.ended] == ["abort"]


async def test_a_cut_in_the_middle_is_told_behind_what_was_written(talk: Talk) -> None:
    async with talk.stream(COMPLETIONS, body_for(COMPLETIONS, 100)) as stream:
        for token_id in encode("the quick brown fox"):
            stream.say(token_id)
            await stream.taken()
        assert talk.written
        talk.cut.set()
        await asyncio.wait_for(stream.over.wait(), 30)
    events = stream.text.split("\n\n")
    texts = [orjson.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-3]]
    assert "".join(texts) == "the quick brown fox"
    assert orjson.loads(events[-3].removeprefix("data: "))["error"]["code"] == "draining"
    assert events[-2:] == ["data: [DONE]", ""]
    await eventually(lambda: talk.worker.cancels == [(stream.spec.request_id, 1)])


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_client_that_stops_reading_closes_the_shortcut(talk: Talk, is_cut: bool) -> None:
    """What the worker says meanwhile waits where the reader would find it, and comes in order later."""
    stuck, may_go_on = asyncio.Event(), asyncio.Event()

    async def on_data(data: bytes) -> None:
        if len(talk.written) == 2 and not may_go_on.is_set():
            stuck.set()
            await may_go_on.wait()

    token_ids = encode("the quick brown fox jumps over the lazy dog")
    async with talk.stream(COMPLETIONS, body_for(COMPLETIONS, len(token_ids)), on_data) as stream:
        told = 0
        while not stuck.is_set():
            stream.say(token_ids[told])
            told += 1
            await stream.taken()
        num_tokens, num_bytes = stream.num_tokens, len(stream.data)
        for token_id in token_ids[told:-1]:
            stream.say(token_id)
        for _ in range(3):
            await _told_other(talk)
        assert len(stream.data) == num_bytes, "nothing overtakes what is stuck"
        assert stream.num_tokens <= num_tokens + 64, "one message at most is taken by the reader, who then waits too"
        if is_cut:
            talk.cut.set()
        else:
            may_go_on.set()
            stream.say(token_ids[-1], finish_reason=pb.FINISH_REASON_LENGTH)
            await asyncio.wait_for(stream.over.wait(), 30)
    if not is_cut:
        events = stream.text.split("\n\n")[:-2]
        texts = [orjson.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
        assert "".join(texts) == "the quick brown fox jumps over the lazy dog"


async def _told_other(talk: Talk) -> None:
    """Another client is served meanwhile."""
    async with talk.stream(CHAT, body_for(CHAT, 3)) as stream:
        stream.say(*encode("the fox")[:1])
        await stream.taken()
        stream.say(*encode("the fox")[1:], finish_reason=pb.FINISH_REASON_LENGTH)
        await asyncio.wait_for(stream.over.wait(), 30)


async def test_a_stop_string_is_found_on_the_longer_way(talk: Talk) -> None:
    async with talk.stream(CHAT, body_for(CHAT, 100, stop="brown")) as stream:
        for token_id in encode("the quick brown fox"):
            stream.say(token_id)
        await asyncio.wait_for(stream.over.wait(), 30)
    assert '"finish_reason":"stop"' in stream.text
    assert not talk.written
    await eventually(lambda: bool(talk.worker.cancels))


async def test_what_rendering_raises_ends_the_stream_with_an_error(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = encode("the quick brown fox")
    async with talk.stream(CHAT, body_for(CHAT, 100)) as stream:
        stream.say(token_ids[0])
        await stream.taken()

        def fail(self: Outlet, data: bytes) -> None:
            raise ValueError("as scripted")

        monkeypatch.setattr(Outlet, "write", fail)
        for token_id in token_ids[1:]:
            stream.say(token_id)
        await asyncio.wait_for(stream.over.wait(), 30)
    events = stream.text.split("\n\n")
    assert orjson.loads(events[-3].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert [record.outcome for record in talk.made.ended] == ["error"]
    await eventually(lambda: bool(talk.worker.cancels))
