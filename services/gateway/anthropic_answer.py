"""POST /v1/messages, on its way out: a message of blocks, or the events that build it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from baton.services.gateway.choice import ChoicePiece
from baton.services.gateway.collect import CollectedChoice
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.errors import public_error
from baton.services.gateway.parts import CallBegin, Part, Thought
from baton.services.gateway.pipeline import Generation
from baton.services.gateway.rendering import Answer
from baton.services.gateway.sse import Form
from baton.services.gateway.tools.calls import CallArguments, Text
from baton.services.gateway.translation import parts_of

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def _event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: ".encode() + orjson.dumps({"type": name, **fields}) + b"\n\n"


FORM = Form(lambda error: b"event: error\ndata: " + public_error(error).anthropic_body() + b"\n\n", end=b"")


@dataclass(slots=True)
class Blocks:
    """The blocks of a message, from the parts that its text is made of. Pure: feed it in order, then ``close``."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    _arguments: list[str] = field(default_factory=list)
    _is_open: bool = False

    def feed(self, parts: Iterable[Part]) -> list[bytes]:
        """The events that these parts make."""
        events: list[bytes] = []
        for part in parts:
            match part:
                case Text(text):
                    events += self._add("text", "text", text, "text_delta")
                case Thought(text):
                    events += self._add("thinking", "thinking", text, "thinking_delta")
                case CallBegin(_, call_id, name):
                    events += self._open({"type": "tool_use", "id": call_id, "name": name, "input": {}})
                case CallArguments(_, text):
                    self._arguments.append(text)
                    events.append(self._delta({"type": "input_json_delta", "partial_json": text}))
        return events

    def close(self) -> list[bytes]:
        """Ends the last block."""
        if not self._is_open:
            return []
        self._is_open = False
        block = self.blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _arguments_of("".join(self._arguments))
        return [_event("content_block_stop", index=len(self.blocks) - 1)]

    def _add(self, kind: str, name: str, text: str, delta: str) -> list[bytes]:
        events = []
        if not self._is_open or self.blocks[-1]["type"] != kind:
            signature = {"signature": ""} if kind == "thinking" else {}
            events += self._open({"type": kind, name: "", **signature})
        self.blocks[-1][name] += text
        return [*events, self._delta({"type": delta, name: text})]

    def _open(self, block: dict[str, Any]) -> list[bytes]:
        events = self.close()
        self.blocks.append(block)
        self._arguments = []
        self._is_open = True
        start = {**block, "input": {}} if block["type"] == "tool_use" else dict(block)
        return [*events, _event("content_block_start", index=len(self.blocks) - 1, content_block=start)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self.blocks) - 1, delta=delta)


class MessagesAnswer(Answer):
    """Renders one generation as a message."""

    id_prefix = "msg_"
    object_name = "message"

    def __init__(self, generation: Generation, deps: GatewayDeps, receipt_id: str) -> None:
        super().__init__(generation, deps, receipt_id)
        self._blocks = Blocks()
        self._has_begun = False
        self._ending: dict[str, Any] = {}

    @property
    def form(self) -> Form:
        return FORM

    def whole(self, choices: list[CollectedChoice]) -> bytes:
        """The JSON body of an answer that is not streamed."""
        choice = choices[0]
        blocks = Blocks()
        blocks.feed([Text(choice.text)] if choice.parts is None else choice.parts)
        blocks.close()
        return orjson.dumps(self._message(blocks.blocks) | _ending(choice.finish_reason, choice.stop_reason))

    def render(self, piece: ChoicePiece) -> bytes:
        events = [] if self._has_begun else [_event("message_start", message=self._message([])), _event("ping")]
        self._has_begun = True
        events += self._blocks.feed(parts_of(piece))
        if piece.finish_reason is not None:
            self._ending = _ending(piece.finish_reason, piece.stop_reason)
        return b"".join(events)

    def ending(self) -> bytes:
        delta = _event("message_delta", delta=self._ending, usage=self._tokens())
        return b"".join([*self._blocks.close(), delta, _event("message_stop")])

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.generation.options.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._tokens(),
        }

    def _tokens(self) -> dict[str, int]:
        """What was read from the cache is not counted as input again, as Anthropic does it."""
        usage = self.generation.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


def _ending(finish_reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": _STOP_REASONS.get(finish_reason or "", "end_turn"), "stop_sequence": None}


def _arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments. Cut off by the length limit they may be no JSON: then there are none."""
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
