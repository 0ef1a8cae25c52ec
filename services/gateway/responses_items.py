"""The output items of a response, and the events that build them, in OpenAI's order."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from baton.services.gateway.parts import CallBegin, Part, Thought
from baton.services.gateway.tools.calls import CallArguments, Text

Event = dict[str, Any]  # without its sequence number


@dataclass(slots=True)
class Items:
    """Feed it the parts of one answer in order, then ``close``. No clock, no I/O."""

    output: list[dict[str, Any]] = field(default_factory=list)
    _is_open: bool = False

    def feed(self, parts: Iterable[Part]) -> list[Event]:
        """The events that these parts make."""
        events: list[Event] = []
        for part in parts:
            match part:
                case Text(text):
                    events += self._add_text("message", "output_text", text)
                case Thought(text):
                    events += self._add_text("reasoning", "reasoning_text", text)
                case CallBegin(_, call_id, name):
                    item = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                    events += self._open("fc_", item)
                case CallArguments(_, text):
                    self.output[-1]["arguments"] += text
                    events.append(self._at("response.function_call_arguments.delta", delta=text))
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """Ends the last item. ``status``: incomplete where the answer was cut."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self.output[-1]
        item["status"] = status
        events: list[Event] = []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._at("response.function_call_arguments.done", **done))
        else:
            part = item["content"][0]
            logprobs: Event = {"logprobs": []} if part["type"] == "output_text" else {}
            events.append(self._at(f"response.{part['type']}.done", content_index=0, text=part["text"], **logprobs))
            events.append(self._at("response.content_part.done", content_index=0, part=dict(part)))
        return [*events, self._item_event("response.output_item.done")]

    def _add_text(self, item_type: str, part_type: str, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self.output[-1]["type"] != item_type:
            part: dict[str, Any] = {"type": part_type, "text": ""}
            if item_type == "message":
                part |= {"annotations": [], "logprobs": []}
                events += self._open("msg_", {"type": item_type, "role": "assistant", "content": []})
            else:
                events += self._open("rs_", {"type": item_type, "summary": [], "content": []})
            self.output[-1]["content"].append(part)
            events.append(self._at("response.content_part.added", content_index=0, part=dict(part)))
        part = self.output[-1]["content"][0]
        part["text"] += text
        logprobs: Event = {"logprobs": []} if part_type == "output_text" else {}
        events.append(self._at(f"response.{part_type}.delta", content_index=0, delta=text, **logprobs))
        return events

    def _open(self, prefix: str, item: dict[str, Any]) -> list[Event]:
        events = self.close()
        self.output.append({"id": prefix + secrets.token_hex(16), **item, "status": "in_progress"})
        self._is_open = True
        return [*events, self._item_event("response.output_item.added")]

    def _at(self, event_type: str, **fields: Any) -> Event:
        return {"type": event_type, "item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, **fields}

    def _item_event(self, event_type: str) -> Event:
        item = self.output[-1]
        content = {"content": [dict(part) for part in item["content"]]} if "content" in item else {}
        return {"type": event_type, "output_index": len(self.output) - 1, "item": item | content}
