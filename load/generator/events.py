"""Server-sent events of OpenAI's streams: bytes in pieces of any size to what they say. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson


@dataclass(slots=True)
class StreamEvent:
    """What one event says. ``has_output``: tokens came with it, visible or not."""

    has_output: bool = False
    text: str = ""
    token_ids: tuple[int, ...] = ()
    usage: dict[str, Any] | None = None
    error: str | None = None
    response_id: str = ""
    is_done: bool = False  # [DONE]
    is_finished: bool = False  # a choice has its finish_reason


class EventSplitter:
    """Cuts a byte stream into the values of its ``data:`` lines. OpenAI's events have one such line each."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def read_event(data: bytes) -> StreamEvent:
    """Raises ValueError for what is neither JSON nor [DONE]."""
    if data == b"[DONE]":
        return StreamEvent(is_done=True)
    content = orjson.loads(data)
    if not isinstance(content, dict):
        raise ValueError("an event that is no object")
    if "error" in content:
        return StreamEvent(error=error_words(content))
    event = StreamEvent(usage=content.get("usage"), response_id=content.get("id") or "")
    for choice in content.get("choices") or ():
        delta = choice.get("delta")
        others: tuple[Any, ...]
        if delta is None:
            text, others = choice.get("text"), ()
        else:
            text = delta.get("content")
            others = (delta.get("reasoning_content"), delta.get("reasoning"), delta.get("tool_calls"))
        event.text += text or ""
        event.token_ids += tuple(choice.get("token_ids") or ())
        event.has_output = event.has_output or bool(text or event.token_ids or any(others))
        event.is_finished = event.is_finished or choice.get("finish_reason") is not None
    return event


def error_words(content: Any) -> str:
    """The message of an error body in OpenAI's shape, or what there is instead, in one line."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or content).split())[:300]
