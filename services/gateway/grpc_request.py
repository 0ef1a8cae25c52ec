"""GenerateRequest to GenerationOptions: the same body as REST has it, and its fields called what they are called here."""

from __future__ import annotations

from typing import Any

import orjson

from baton.api.inference.v1 import inference_pb2
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.chat import chat_options
from baton.services.gateway.completions import completion_options
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.openai_models import ChatCompletionBody, CompletionBody
from baton.services.gateway.options import GenerationOptions
from baton.services.gateway.translation import renamed
from baton.services.gateway.validation import invalid, parse_body

_OPTIONAL = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "min_tokens", "n", "skip_special_tokens", "prompt_logprobs", "priority"),
    *("add_special_tokens", "session_ttl_s"),
)
_CHOICES = ("auto", "none", "required")
# What shared checks call a field, and what it is called here.
_NAMES = {
    "x-request-id": "request_id",
    r"structured_outputs\.json": "json_schema",
    r"structured_outputs\.(\w+)": r"\1",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    r"tool_choice\.function\.name": "tool_choice",
}
_CHAT_NAMES = {
    r"messages(\[\d+\])\.tool_calls(\[\d+\])\.function": r"chat.messages\1.tool_calls\2",
    r"messages(\[\d+\])\.reasoning_content": r"chat.messages\1.reasoning",
    "messages": "chat.messages",
    "continue_final_message": "chat.continue_final_message",
    "top_logprobs": "logprobs",
}
_PROMPT_NAMES = {"text": {"prompt": "text"}, "tokens": {"prompt": "tokens.token_ids"}, "chat": _CHAT_NAMES}


def request_options(request: inference_pb2.GenerateRequest, deps: GatewayDeps) -> GenerationOptions:
    """What the request asks for. Raises INVALID_REQUEST or MODEL_NOT_FOUND."""
    fields: dict[str, Any] = {name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)}
    fields |= {
        "model": request.model or None,
        "stop": list(request.stop) or None,
        "stop_token_ids": list(request.stop_token_ids) or None,
        "ignore_eos": request.ignore_eos,
        "cache_salt": request.cache_salt or None,
        "session_id": request.session_id or None,
        "logit_bias": {str(token_id): bias for token_id, bias in request.logit_bias.items()} or None,
        "include_stop_str_in_output": request.include_stop_str_in_output,
        "structured_outputs": _output(request),
    }
    logprobs = request.logprobs if request.HasField("logprobs") else None
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise invalid("prompt", "is required: one of text, tokens and chat")
    if kind == "chat":
        if request.echo:
            raise invalid("echo", "is not for conversations")
        fields |= _chat(request) | {"logprobs": logprobs is not None, "top_logprobs": logprobs}
        return chat_options(parse_body(ChatCompletionBody, fields), deps)
    if request.tools or request.tool_choice:
        raise invalid("tools" if request.tools else "tool_choice", "needs a conversation: chat")
    fields["prompt"] = request.text if kind == "text" else list(request.tokens.token_ids)
    fields |= {"logprobs": logprobs, "echo": request.echo}
    return completion_options(parse_body(CompletionBody, fields), deps, default_max_tokens=None)


def _output(request: inference_pb2.GenerateRequest) -> dict[str, Any] | None:
    match kind := request.WhichOneof("output"):
        case None:
            return None
        case "json_schema":
            return {"json": request.json_schema}
        case "choice":
            return {"choice": list(request.choice.strings)}
        case _:
            return {kind: getattr(request, kind)}


def _chat(request: inference_pb2.GenerateRequest) -> dict[str, Any]:
    chat = request.chat
    fields: dict[str, Any] = {
        "messages": [_message(message) for message in chat.messages],
        "continue_final_message": chat.continue_final_message,
        "tools": [_tool(i, tool) for i, tool in enumerate(request.tools)] or None,
    }
    if chat.HasField("add_generation_prompt"):
        fields["add_generation_prompt"] = chat.add_generation_prompt
    if chat.HasField("enable_thinking"):
        fields["chat_template_kwargs"] = {"enable_thinking": chat.enable_thinking}
    if request.HasField("parallel_tool_calls"):
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    if choice := request.tool_choice:
        named = {"type": "function", "function": {"name": choice}}
        fields["tool_choice"] = choice if choice in _CHOICES else named
    return fields


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    return {
        "role": message.role,
        "content": message.content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id or None,
        "reasoning_content": message.reasoning or None,
        "name": message.name or None,
    }


def _tool(number: int, tool: inference_pb2.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = _json(f"tools[{number}].parameters", tool.parameters)
    return {"type": "function", "function": function}


def _json(param: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise invalid(param, "must be JSON") from None


def renamed_for(error: BatonError, request: inference_pb2.GenerateRequest) -> BatonError:
    """``error`` with its field called what it is called in GenerateRequest."""
    if error.code is ErrorCode.UNAUTHENTICATED:
        return error
    return renamed(error, _NAMES | _PROMPT_NAMES.get(request.WhichOneof("prompt") or "", {}))
