"""The parts of a chat choice as OpenAI's API writes them: one message, or deltas of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from baton.services.gateway.parts import CallBegin, Part, Thought
from baton.services.gateway.tools.calls import CallArguments, Text


def message_of(parts: Iterable[Part]) -> dict[str, Any]:
    """A whole message. Thoughts have two names: vLLM's, and the older one that more clients know."""
    content, thoughts, calls = list[str](), list[str](), dict[int, dict[str, Any]]()
    for part in parts:
        match part:
            case Text(text):
                content.append(text)
            case Thought(text):
                thoughts.append(text)
            case CallBegin(index, call_id, name):
                calls[index] = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
            case CallArguments(index, text):
                calls[index]["function"]["arguments"] += text
    said = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": said if said or not calls else None}
    if thoughts:
        message |= {"reasoning_content": "".join(thoughts), "reasoning": "".join(thoughts)}
    if calls:
        message["tool_calls"] = list(calls.values())
    return message


def delta_of(part: Part) -> dict[str, Any]:
    """One part of a streamed message."""
    match part:
        case Thought(text):
            return {"reasoning_content": text, "reasoning": text}
        case CallBegin(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case Text(text):
            return {"content": text}
