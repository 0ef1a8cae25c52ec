"""POST /v1/responses, on its way in: the same request as the chat API would have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from baton.services.gateway.chat import chat_options
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.openai_models import ChatCompletionBody
from baton.services.gateway.options import GenerationOptions
from baton.services.gateway.responses_models import ResponsesBody
from baton.services.gateway.translation import Message, string_of, text_of
from baton.services.gateway.validation import invalid, parse_body

_SAME = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop", "ignore_eos", "min_tokens", "cache_salt", "session_id", "priority"),
    *("parallel_tool_calls", "logit_bias", "session_ttl_s", "prompt_cache_retention"),
)
_TEXT_KINDS = ("input_text", "output_text", "text")
_ROLES = ("user", "system", "developer", "assistant")
# The only thing that may be asked for besides: thoughts are plain here, so that there is nothing encrypted to include.
_INCLUDED = ("reasoning.encrypted_content",)
_NO_THOUGHTS = ("none", "minimal")
# What the shared checks call a field, and what it is called here.
NAMES = {
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    r"tool_choice\.function": "tool_choice",
    r"response_format\.json_schema": "text.format",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "messages": "input",
}


def responses_options(body: ResponsesBody, deps: GatewayDeps) -> GenerationOptions:
    """What a Responses request asks for. Raises INVALID_REQUEST or MODEL_NOT_FOUND."""
    if body.background:
        raise invalid("background", "must be false: responses are not kept by this server")
    if body.truncation not in (None, "disabled"):
        raise invalid("truncation", 'must be "disabled": this server does not choose what to forget')
    for name in body.include or ():
        if name not in _INCLUDED:
            raise invalid("include", f"may have {', '.join(_INCLUDED)}, not {name[:60]!r}")
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields |= {
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "tools": None if not body.tools else [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools)],
        "tool_choice": _tool_choice(body.tool_choice),
        "response_format": _format(body.text),
    }
    if body.reasoning is not None and body.reasoning.get("effort") is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": body.reasoning["effort"] not in _NO_THOUGHTS}
    options = chat_options(parse_body(ChatCompletionBody, fields), deps)
    return replace(options, prompt_param="input", max_tokens_param="max_output_tokens")


def _messages(body: ResponsesBody) -> list[Message]:
    messages: list[Message] = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not isinstance(body.input, list) or not body.input:
        raise invalid("input", "must be a string or a list of items, at least one")
    thought = ""
    for i, item in enumerate(body.input):
        path = f"input[{i}]"
        if not isinstance(item, dict):
            raise invalid(path, "must be an object")
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought = _thought(path, item)
            continue
        message = _message(path, kind, item)
        last = messages[-1] if messages else None
        # What an assistant says and calls in one turn is one message for chat templates.
        if "tool_calls" in message and last is not None and last["role"] == "assistant" and not thought:
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
            continue
        if thought and message["role"] == "assistant":
            message["reasoning_content"], thought = thought, ""
        messages.append(message)
    return messages


def _message(path: str, kind: Any, item: dict[str, Any]) -> Message:
    match kind:
        case "message":
            role = item.get("role")
            if role not in _ROLES:
                raise invalid(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
            return {"role": role, "content": text_of(f"{path}.content", item.get("content"), _TEXT_KINDS)}
        case "function_call":
            function = {name: string_of(path, item, name) for name in ("name", "arguments")}
            call = {"id": string_of(path, item, "call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            content = text_of(f"{path}.output", item.get("output"), _TEXT_KINDS)
            return {"role": "tool", "tool_call_id": string_of(path, item, "call_id"), "content": content}
        case _:
            kinds = "message, function_call, function_call_output or reasoning"
            raise invalid(f"{path}.type", f"must be {kinds}: nothing else is known to this server")


def _thought(path: str, item: dict[str, Any]) -> str:
    """Of a reasoning item, what the model itself had thought; a summary is not that."""
    return text_of(f"{path}.content", item.get("content") or [], ("reasoning_text",))


def _tool(path: str, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise invalid(f"{path}.type", 'must be "function": this server runs no tools itself')
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise invalid("tool_choice.type", 'must be "function"')
    return {"type": "function", "function": {"name": string_of("tool_choice", choice, "name")}}


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    asked = (text or {}).get("format")
    if asked is None:
        return None
    if not isinstance(asked, dict) or asked.get("type") not in ("text", "json_object", "json_schema"):
        raise invalid("text.format.type", 'must be "text", "json_object" or "json_schema"')
    if asked["type"] != "json_schema":
        return {"type": asked["type"]}
    schema = {name: asked.get(name) for name in ("name", "schema", "strict") if asked.get(name) is not None}
    return {"type": "json_schema", "json_schema": schema}
