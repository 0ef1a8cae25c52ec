"""What a client may send as a prompt, a conversation or a token list, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from baton.services.gateway.limits import Limits
from baton.services.gateway.options import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from baton.services.gateway.tokenizer import ChatOptions, ModelTokenizer
from baton.services.gateway.validation import check_token_ids, invalid

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEMPLATE_SWITCHES = ("enable_thinking", "thinking")
_MAX_CALLS = 1024
_PROMPT_SHAPES = "must be a string, a list of token ids, or a list of either"


def parse_prompts(
    prompt: Any, *, add_special_tokens: bool, tokenizer: ModelTokenizer, vocab_size: int, limits: Limits
) -> tuple[Prompt, ...]:
    """The prompts of a completion request, in order. Raises INVALID_REQUEST naming "prompt"."""
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif not isinstance(prompt, list):
        raise invalid("prompt", _PROMPT_SHAPES)
    elif not prompt:
        raise invalid("prompt", "must not be empty")
    elif _is_token_id(prompt[0]):
        prompts = [prompt]
    else:
        prompts = prompt
    if len(prompts) > limits.max_choices:
        raise invalid("prompt", f"must be at most {limits.max_choices} prompts, not {len(prompts)}")
    if len({type(one) for one in prompts}) > 1:
        raise invalid("prompt", "must not mix strings and token ids")
    return tuple(_parse_prompt(one, add_special_tokens, tokenizer, vocab_size) for one in prompts)


def _parse_prompt(prompt: Any, add_special_tokens: bool, tokenizer: ModelTokenizer, vocab_size: int) -> Prompt:
    if isinstance(prompt, str):
        if not prompt and not (add_special_tokens and tokenizer.adds_tokens_to_empty_text):
            raise invalid("prompt", "must not be empty: this model has no begin-of-sequence token")
        return TextPrompt(prompt, add_special_tokens)
    if not isinstance(prompt, list):
        raise invalid("prompt", _PROMPT_SHAPES)
    if not prompt:
        raise invalid("prompt", "must not be empty")
    if not all(map(_is_token_id, prompt)):
        raise invalid("prompt", _PROMPT_SHAPES)
    check_token_ids("prompt", prompt, vocab_size)
    return TokenPrompt(prompt)


def _is_token_id(value: Any) -> bool:
    return type(value) is int


def parse_chat(
    messages: list[dict[str, Any]],
    *,
    tokenizer: ModelTokenizer,
    limits: Limits,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> ChatPrompt:
    """The conversation of a chat request. Raises INVALID_REQUEST naming the message at fault, "messages[2].role" say."""
    if not messages:
        raise invalid("messages", "must not be empty")
    if len(messages) > limits.max_messages:
        raise invalid("messages", f"must be at most {limits.max_messages}, not {len(messages)}")
    if continue_final_message and add_generation_prompt:
        raise invalid("continue_final_message", "excludes add_generation_prompt")
    for name, value in (template_kwargs or {}).items():
        if name not in _TEMPLATE_SWITCHES:
            raise invalid("chat_template_kwargs", f"may only have {' and '.join(_TEMPLATE_SWITCHES)}")
        if not isinstance(value, bool):
            raise invalid(f"chat_template_kwargs.{name}", "must be true or false")
    parsed = [
        _parse_message(f"messages[{i}]", message, tokenizer.knows_developer_role) for i, message in enumerate(messages)
    ]
    options = ChatOptions(
        add_generation_prompt=not continue_final_message if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=bool(continue_final_message),
        template_kwargs=dict(template_kwargs or {}),
        tools=tools,
    )
    return ChatPrompt(list(parsed), options)


def _parse_message(path: str, message: dict[str, Any], knows_developer_role: bool) -> Mapping[str, Any]:
    role = message.get("role")
    if role is None:
        raise invalid(f"{path}.role", "is required")
    if role not in _ROLES:
        raise invalid(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    for name in ("function_call", "audio"):
        if message.get(name):
            raise invalid(f"{path}.{name}", "is not supported by this server")
    if role == "developer" and not knows_developer_role:
        role = "system"  # the newer name of the same thing; most templates know only the older one
    calls = _parse_calls(f"{path}.tool_calls", role, message.get("tool_calls"))
    content = message.get("content")
    # Who calls tools need not say anything.
    parsed: dict[str, Any] = {
        "role": role,
        "content": "" if calls and content is None else _parse_content(f"{path}.content", content),
    }
    if calls:
        parsed["tool_calls"] = calls
    if role == "assistant":
        thought = message.get("reasoning_content", message.get("reasoning"))
        if thought is not None and not isinstance(thought, str):
            raise invalid(f"{path}.reasoning_content", "must be a string")
        if thought:
            parsed["reasoning_content"] = thought
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise invalid(f"{path}.{name}", "must be a string")
            parsed[name] = value
    return parsed


def _parse_calls(path: str, role: str, calls: Any) -> list[dict[str, Any]]:
    """The calls of an earlier answer; arguments become objects, as chat templates read them."""
    if calls is None or calls == []:
        return []
    if role != "assistant":
        raise invalid(path, "may only stand in messages of the assistant")
    if not isinstance(calls, list) or len(calls) > _MAX_CALLS:
        raise invalid(path, f"must be a list of calls, at most {_MAX_CALLS}")
    return [_parse_call(f"{path}[{i}]", call) for i, call in enumerate(calls)]


def _parse_call(path: str, call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise invalid(f"{path}.type", 'must be "function"')
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{path}.function.name", "is required and must be a string")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            raise invalid(f"{path}.function.arguments", "must be JSON") from None
    if not isinstance(arguments, dict):
        raise invalid(f"{path}.function.arguments", "must be a JSON object")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        if not isinstance(call["id"], str):
            raise invalid(f"{path}.id", "must be a string")
        parsed["id"] = call["id"]
    return parsed


def _parse_content(path: str, content: Any) -> str:
    """Text, or text parts joined by line feeds."""
    if content is None:
        raise invalid(path, "is required")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(path, "must be a string or a list of parts, at least one")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise invalid(f"{path}[{i}].type", 'must be "text": this server takes no images, sound or files')
        if not isinstance(part.get("text"), str):
            raise invalid(f"{path}[{i}].text", "must be a string")
        texts.append(part["text"])
    return "\n".join(texts)
