"""What a client may send as a prompt, a conversation or a token list, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton.services.gateway.limits import Limits
from baton.services.gateway.options import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from baton.services.gateway.tokenizer import ChatOptions, ModelTokenizer
from baton.services.gateway.validation import check_token_ids, invalid

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEMPLATE_SWITCHES = ("enable_thinking", "thinking")
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
    )
    return ChatPrompt(list(parsed), options)


def _parse_message(path: str, message: dict[str, Any], knows_developer_role: bool) -> Mapping[str, Any]:
    role = message.get("role")
    if role is None:
        raise invalid(f"{path}.role", "is required")
    if role not in _ROLES:
        raise invalid(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise invalid(f"{path}.{name}", "is not supported by this server")
    if role == "developer" and not knows_developer_role:
        role = "system"  # the newer name of the same thing; most templates know only the older one
    parsed = {"role": role, "content": _parse_content(f"{path}.content", message.get("content"))}
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise invalid(f"{path}.{name}", "must be a string")
            parsed[name] = value
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
