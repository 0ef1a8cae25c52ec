"""C, continued: streamed calls of tools, and reasoning."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.api_client import CHAT, MESSAGES, Api

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Ulm", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["required", "named"]
)
def test_b064_calls_come_in_deltas(api: Api, choice: Any) -> None:
    fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 120, "parallel_tool_calls": False}
    fields["logit_bias"] = api.without_space()
    response = api.post(CHAT, api.body(CHAT, **fields))
    if response.status_code == 400 and "pars" in response.text:
        pytest.skip("the server does not know how this model calls tools")
    whole = response.json()["choices"][0]
    stream = api.stream(CHAT, **fields)
    deltas = [call for choice in stream.choice_events() for call in choice["delta"].get("tool_calls") or ()]
    first, *later = deltas
    assert first["index"] == 0
    assert first["id"]
    assert first["type"] == "function"
    assert first["function"]["name"] == "weather"
    assert not any(call.get("id") or call["function"].get("name") for call in later)
    joined = "".join(call["function"].get("arguments") or "" for call in deltas)
    assert set(json.loads(joined)) == {"city", "days"}
    assert joined == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert stream.finish_reason() in ("tool_calls", "stop")
    assert whole["finish_reason"] == stream.finish_reason()
    if choice == "required":
        assert whole["finish_reason"] == "tool_calls"


def thought_of(part: dict[str, Any]) -> str:
    return str(part.get("reasoning") or part.get("reasoning_content") or "")


def test_b065_reasoning_is_never_mixed_into_content(api: Api) -> None:
    """Where the prompt has opened thoughts, what follows are thoughts; where it has closed them, none are."""
    opened: dict[str, Any] = {
        "messages": [*MESSAGES, {"role": "assistant", "content": "<think>"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 8,
        "min_tokens": 8,
    }
    message = api.chat(**opened)["choices"][0]["message"]
    if not thought_of(message):
        pytest.skip("the server does not know how this model thinks")
    assert not message["content"]
    stream = api.stream(CHAT, **opened)
    assert stream.text() == ""
    assert "".join(thought_of(choice["delta"]) for choice in stream.choice_events()) == thought_of(message)
    closed = api.chat(chat_template_kwargs={"enable_thinking": False}, min_tokens=4)["choices"][0]["message"]
    assert closed["content"]
    assert not thought_of(closed)
