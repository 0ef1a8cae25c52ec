"""POST /v1/messages, on its way in: the same request as the chat API would have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from baton.services.gateway.anthropic_models import CountTokensBody, MessagesBody
from baton.services.gateway.chat import chat_options
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.openai_models import ChatCompletionBody
from baton.services.gateway.options import GenerationOptions
from baton.services.gateway.sessions import asked_ttl_s
from baton.services.gateway.translation import Message, part_text, string_of, text_of
from baton.services.gateway.validation import invalid, parse_body

_SAME = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "min_tokens",
    "ignore_eos",
    "cache_salt",
    "session_id",
    "logit_bias",
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# What the shared checks call a field, and what it is called here.
NAMES = {
    "stop": "stop_sequences",
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


def messages_options(body: MessagesBody, deps: GatewayDeps) -> GenerationOptions:
    """What a Messages request asks for. Raises INVALID_REQUEST or MODEL_NOT_FOUND."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields |= {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "session_ttl_s": asked_ttl_s(body) if body.session_ttl_s is None else body.session_ttl_s,
        "response_format": _format(body.output_config),
    }
    return _options(body, fields, deps)


def count_options(body: CountTokensBody, deps: GatewayDeps) -> GenerationOptions:
    """The same, for whoever only wants to know how long the prompt is."""
    return _options(body, {"model": body.model}, deps)


def _options(body: CountTokensBody, fields: dict[str, Any], deps: GatewayDeps) -> GenerationOptions:
    messages = [] if body.system is None else [{"role": "system", "content": text_of("system", body.system, ("text",))}]
    for i, message in enumerate(body.messages):
        messages += _messages(f"messages[{i}]", message)
    if not body.messages:
        raise invalid("messages", "must not be empty")
    fields["messages"] = messages
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        # Anthropic's way of saying how the answer begins.
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        fields["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice)
    if body.thinking is not None:
        kind = body.thinking.get("type")
        if kind not in ("enabled", "disabled", "adaptive"):
            raise invalid("thinking.type", 'must be "enabled", "disabled" or "adaptive"')
        if kind != "adaptive":
            fields["chat_template_kwargs"] = {"enable_thinking": kind == "enabled"}
    return chat_options(parse_body(ChatCompletionBody, fields), deps)


def _messages(path: str, message: dict[str, Any]) -> list[Message]:
    role = message.get("role")
    if role not in ("user", "assistant"):
        raise invalid(f"{path}.role", "must be user or assistant; a system prompt is the field system")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not content:
        raise invalid(f"{path}.content", "must be a string or a list of blocks, at least one")
    blocks = [(f"{path}.content[{i}]", block) for i, block in enumerate(content)]
    return _assistant(blocks) if role == "assistant" else _user(blocks)


def _user(blocks: Sequence[tuple[str, Any]]) -> list[Message]:
    """Results of tools are messages of their own for chat templates; text between them keeps its place."""
    messages: list[Message] = []
    for path, block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            content = block.get("content")
            text = "" if content is None else text_of(f"{path}.content", content, ("text",))
            messages.append({"role": "tool", "tool_call_id": string_of(path, block, "tool_use_id"), "content": text})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + part_text(path, block, ("text",))
        else:
            messages.append({"role": "user", "content": part_text(path, block, ("text",))})
    return messages


def _assistant(blocks: Sequence[tuple[str, Any]]) -> list[Message]:
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for path, block in blocks:
        match block.get("type") if isinstance(block, dict) else None:
            case "thinking":
                thoughts.append(string_of(path, block, "thinking"))
            case "redacted_thinking":
                pass  # nobody but its author can read it
            case "tool_use":
                if not isinstance(block.get("input"), dict):
                    raise invalid(f"{path}.input", "is required and must be an object")
                function = {"name": string_of(path, block, "name"), "arguments": orjson.dumps(block["input"]).decode()}
                calls.append({"id": string_of(path, block, "id"), "type": "function", "function": function})
            case _:
                texts.append(part_text(path, block, ("text",)))
    message: Message = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _tool(path: str, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise invalid(f"{path}.type", 'must be "custom": this server runs no tools itself')
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    kind = choice.get("type")
    if kind == "tool":
        name = string_of("tool_choice", choice, "name")
        fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif kind in _CHOICES:
        fields["tool_choice"] = _CHOICES[kind]
    else:
        raise invalid("tool_choice.type", 'must be "auto", "any", "tool" or "none"')
    one_at_most = choice.get("disable_parallel_tool_use")
    if one_at_most is not None:
        if not isinstance(one_at_most, bool):
            raise invalid("tool_choice.disable_parallel_tool_use", "must be true or false")
        fields["parallel_tool_calls"] = not one_at_most
    return fields


def _format(config: dict[str, Any] | None) -> dict[str, Any] | None:
    asked = (config or {}).get("format")
    if asked is None:
        return None
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        raise invalid("output_config.format.type", 'must be "json_schema"')
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked.get("schema")}}
