"""A server that answers a stream at once and costs next to nothing, for measuring the generator itself.

Run as a process: it prints its port and serves until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
import orjson

from baton.services.runtime.main import loop_factory

NUM_TOKENS = 8

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_TOKEN = b'data: {"id":"x","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'
_LAST = (
    b'data: {"id":"x","choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
    b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":16,"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
    % NUM_TOKENS
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_STREAM = _HEAD + b"".join(_chunk(_TOKEN) for _ in range(NUM_TOKENS)) + _chunk(_LAST) + b"0\r\n\r\n"


def _json(content: Any) -> bytes:
    body = orjson.dumps(content)
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


class NullProtocol(asyncio.Protocol):
    """Model list, usage by words, and streams of NUM_TOKENS tokens in one write."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._parser = httptools.HttpRequestParser(self)
        self._path, self._body = b"", bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url, bytearray()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._path == b"/v1/models":
            answer = _json({"data": [{"id": "null"}]})
        elif b'"stream":true' in self._body:
            answer = _STREAM
        elif self._path == b"/v1/completions":
            prompt = orjson.loads(self._body)["prompt"]
            answer = _json({"choices": [{"text": " word"}], "usage": {"prompt_tokens": len(prompt.split())}})
        else:
            answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        self._transport.write(answer)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(NullProtocol, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve())
