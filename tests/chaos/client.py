"""A streaming HTTP client of few lines: it can read slowly, hang up anywhere, and notes when every token came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_GET_TIMEOUT_S = 30.0
_MAX_LINE_BYTES = 1 << 20


@dataclass
class Answer:
    """What a client got."""

    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)  # one, if all is well
    num_done: int = 0  # [DONE] events: one
    error: str = ""  # the code of the error body or event; "connection" when it just broke
    message: str = ""
    token_s: list[float] = field(default_factory=list)  # when each event with tokens came
    sent_s: float = 0.0
    ended_s: float = 0.0
    hung_up: bool = False  # we did


class Disconnect(Exception):
    """The client has had enough."""


@dataclass
class Behaviour:
    """How a client reads: everything as it comes, unless set otherwise."""

    hang_up_after_s: float | None = None
    hang_up_after_tokens: int | None = None
    bytes_per_s: float | None = None


async def stream(url: str, request_id: str, body: dict[str, Any], behaviour: Behaviour, answer: Answer) -> None:
    """POSTs a streaming completion and fills ``answer`` while it comes. Never raises for what the server does."""
    answer.sent_s = time.monotonic()
    try:
        async with asyncio.timeout(behaviour.hang_up_after_s):
            await _stream(url, request_id, body, behaviour, answer)
    except (TimeoutError, Disconnect):
        answer.hung_up = True
    except (OSError, EOFError) as error:
        answer.error = answer.error or "connection"
        answer.message = answer.message or str(error) or type(error).__name__
    finally:
        answer.ended_s = time.monotonic()


async def _stream(url: str, request_id: str, body: dict[str, Any], behaviour: Behaviour, answer: Answer) -> None:
    limit = 2048 if behaviour.bytes_per_s else _MAX_LINE_BYTES
    reader, writer = await _open(url, "POST", "/v1/completions", body, {"x-request-id": request_id}, limit)
    try:
        answer.status = await _status(reader)
        if answer.status != 200:
            _note_error(json.loads(await _body(reader)), answer)
            return
        lines = _slow_lines(reader, behaviour.bytes_per_s) if behaviour.bytes_per_s else reader
        async for line in lines:
            if line.startswith(b"data: "):
                _note(line[6:].strip(), answer)
            if behaviour.hang_up_after_tokens is not None and len(answer.token_ids) >= behaviour.hang_up_after_tokens:
                raise Disconnect
        if not answer.num_done:
            raise EOFError("the stream ended without [DONE]")
    finally:
        writer.transport.abort() if answer.num_done == 0 else writer.close()


def _note(data: bytes, answer: Answer) -> None:
    if data == b"[DONE]":
        answer.num_done += 1
        return
    event = json.loads(data)
    if "error" in event:
        _note_error(event, answer)
        return
    for choice in event["choices"]:
        if choice.get("token_ids"):
            answer.token_ids += choice["token_ids"]
            answer.token_s.append(time.monotonic())
        answer.text += choice["text"]
        if choice["finish_reason"] is not None:
            answer.finish_reasons.append(choice["finish_reason"])


def _note_error(body: dict[str, Any], answer: Answer) -> None:
    error = body["error"]
    answer.error, answer.message = str(error["code"] or error["type"]), error["message"]


async def _slow_lines(reader: asyncio.StreamReader, bytes_per_s: float) -> Any:
    rest = b""
    while data := await reader.read(max(1, int(bytes_per_s * 0.05))):
        await asyncio.sleep(len(data) / bytes_per_s)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


async def get(url: str, path: str) -> tuple[int, bytes]:
    """GETs a page: its status and body."""
    async with asyncio.timeout(_GET_TIMEOUT_S):
        reader, writer = await _open(url, "GET", path, None, {}, _MAX_LINE_BYTES)
        try:
            return await _status(reader), await _body(reader)
        finally:
            writer.close()


async def get_json(url: str, path: str) -> Any:
    return json.loads((await get(url, path))[1])


async def _open(
    url: str, method: str, path: str, body: Any, headers: dict[str, str], limit: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    split = urlsplit(url)
    reader, writer = await asyncio.open_connection(split.hostname, split.port, limit=limit)
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"host: {split.netloc}", "connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(content)}"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
    return reader, writer


async def _status(reader: asyncio.StreamReader) -> int:
    line = await reader.readline()
    if not line:
        raise EOFError("no answer")
    while (await reader.readline()).strip():  # headers
        pass
    return int(line.split()[1])


async def _body(reader: asyncio.StreamReader) -> bytes:
    """All that comes. Bodies that are not streamed have a length, and the connection closes behind them."""
    return await reader.read()
