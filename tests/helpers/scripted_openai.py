"""A small server with OpenAI's API that does to each request what its script says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httptools

NUM_TOKENS = 4


@dataclass
class ScriptedServer:
    """``script``: one act for each stream, in the order in which they come; the last one goes on for ever.

    ``ok``, ``refuse`` (429), ``busy`` (503), ``fail`` (500), ``stall`` (one token, then nothing), ``silent`` (nothing at all),
    ``cut`` (one token, then the connection is closed), ``close`` (closed before any answer), ``error`` (in the stream),
    ``no-end`` (a stream without its end), ``empty`` (no token), ``garbage`` (an event that is no JSON).
    """

    script: Sequence[str] = ("ok",)
    can_tokenize: bool = True
    models: Sequence[str] = ("scripted",)
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of streams
    headers: list[dict[str, str]] = field(default_factory=list)
    transports: list[Any] = field(default_factory=list)  # of every connection
    num_open: int = 0

    def next_act(self) -> str:
        return self.script[min(len(self.bodies) - 1, len(self.script) - 1)]


@contextmanager
def scripted_openai(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """Runs it, on a thread of its own, until the end of the block."""
    with ThreadPoolExecutor(1) as pool:
        is_up: Future[asyncio.AbstractEventLoop] = Future()
        running = pool.submit(asyncio.run, _serve(server, stop := asyncio.Event(), is_up))
        try:
            loop = is_up.result(30)
            yield server
        finally:
            loop.call_soon_threadsafe(stop.set)
            running.result(30)


async def _serve(server: ScriptedServer, stop: asyncio.Event, is_up: Future[asyncio.AbstractEventLoop]) -> None:
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: _Protocol(server), "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    is_up.set_result(loop)
    await stop.wait()
    # A connection that was just accepted is a task of the loop, which needs its listener to become a transport.
    while accepting := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.gather(*accepting)
    listener.close()
    for transport in server.transports:
        transport.abort()
    while server.num_open:
        await asyncio.sleep(0)


class _Protocol(asyncio.Protocol):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._path = ""
        self._body = bytearray()
        self._headers: dict[str, str] = {}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._server.transports.append(transport)
        self._server.num_open += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.num_open -= 1

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path, self._body, self._headers = url.decode(), bytearray(), {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body = json.loads(self._body) if self._body else {}
        if self._path == "/v1/models":
            models = [{"id": name, "max_model_len": 4096} for name in self._server.models]
            self._answer(200, {"data": models})
        elif self._path == "/tokenize" and self._server.can_tokenize:
            text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            words = text.split()
            overhead = 10 if "messages" in body else 0  # of a chat template
            answer = {"count": len(words) + overhead, "tokens": [100 + len(word) for word in words]}
            self._answer(200, answer | {"token_strs": ["\u0120" + word for word in words]})
        elif self._path.startswith("/v1/") and not body.get("stream"):
            text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            # Two tokens a word and a template of seven.
            self._answer(200, {"choices": [], "usage": {"prompt_tokens": 2 * len(text.split()) + 7}})
        elif self._path.startswith("/v1/"):
            self._server.bodies.append(body)
            self._server.headers.append(self._headers)
            self._act(self._server.next_act(), is_chat=self._path == "/v1/chat/completions")
        else:
            self._answer(404, {"error": {"message": "no such path"}})

    def _act(self, act: str, *, is_chat: bool) -> None:
        statuses = {"refuse": 429, "busy": 503, "fail": 500}
        if act in statuses:
            self._answer(statuses[act], {"error": {"message": f"scripted to {act}", "type": "x"}})
        elif act == "close":
            self._transport.close()
        elif act != "silent":
            self._write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: r-1\r\n")
            self._write(b"transfer-encoding: chunked\r\n\r\n")
            self._stream(act, is_chat)

    def _stream(self, act: str, is_chat: bool) -> None:
        if is_chat:
            self._event(_choice({"role": "assistant", "content": ""}, is_chat))
        num_tokens = {"empty": 0, "stall": 1, "cut": 1}.get(act, NUM_TOKENS)
        for number in range(num_tokens):
            self._event(_choice({"content": f" w{number}"}, is_chat) | {"token_ids": [number]})
        if act == "stall":
            return
        if act == "cut":
            self._transport.close()
            return
        if act == "error":
            self._send({"error": {"message": "scripted error"}})
        if act == "garbage":
            self._chunk(b"data: {nonsense\n\n")
        if act != "no-end":
            self._event(_choice({}, is_chat) | {"finish_reason": "length"})
            usage = {
                "prompt_tokens": 20,
                "completion_tokens": num_tokens,
                "prompt_tokens_details": {"cached_tokens": 16},
            }
            self._send({"id": "s", "choices": [], "usage": usage})
            self._chunk(b"data: [DONE]\n\n")
        self._write(b"0\r\n\r\n")

    def _event(self, choice: dict[str, Any]) -> None:
        self._send({"id": "s", "choices": [{"index": 0, "finish_reason": None} | choice]})

    def _send(self, content: Any) -> None:
        self._chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%s\r\n" % (len(data), data))

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self._write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))

    def _write(self, data: bytes) -> None:
        self._transport.write(data)


def _choice(delta: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    return {"delta": delta} if is_chat else {"text": delta.get("content", "")}
