"""The tools that a client offers, and what the model may do with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from baton.services.gateway.errors import invalid
from baton.services.gateway.limits import Limits
from baton.services.gateway.structured_outputs import check_nesting
from baton.services.gateway.tools.schema_check import check_schema

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function. ``is_strict``: keywords of its schema that cannot be enforced are refused."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool
    definition: dict[str, Any]  # as the chat template gets it


@dataclass(frozen=True, slots=True)
class ToolOffer:
    """``choice``: auto, required, or the name of one tool (then ``must_call`` as well)."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    chosen: str | None = None  # the one tool that must be called
    is_parallel: bool = True

    @property
    def usable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.chosen in (None, tool.name))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.usable)

    @property
    def max_calls(self) -> int | None:
        return None if self.is_parallel and self.chosen is None else 1

    def definitions(self) -> list[dict[str, Any]]:
        return [tool.definition for tool in self.tools]


def parse_tools(tools: Any, choice: Any, is_parallel: bool | None, limits: Limits) -> ToolOffer | None:
    """None where no tool may be called. Raises INVALID_REQUEST naming the field."""
    if tools is None:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "needs tools")
        return None
    if not isinstance(tools, list) or not tools:
        raise invalid("tools", "must be a list of tools, at least one")
    if len(tools) > limits.max_tools:
        raise invalid("tools", f"must be at most {limits.max_tools}, not {len(tools)}")
    parsed = tuple(_parse_tool(f"tools[{i}]", tool, limits) for i, tool in enumerate(tools))
    names = [tool.name for tool in parsed]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise invalid(f"tools[{i}].function.name", f"is {name!r}, which an earlier tool has")
    offer = ToolOffer(parsed, is_parallel=is_parallel is not False)
    match choice:
        case None | "auto":
            return offer
        case "none":
            return None
        case "required":
            return ToolOffer(parsed, must_call=True, is_parallel=offer.is_parallel)
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in names:
                raise invalid("tool_choice", f"names {name[:64]!r}, which is not among the tools")
            return ToolOffer(parsed, must_call=True, chosen=name, is_parallel=False)
    shape = '{"type": "function", "function": {"name": ...}}'
    raise invalid("tool_choice", f'must be "auto", "none", "required" or {shape}')


def _parse_tool(path: str, tool: Any, limits: Limits) -> Tool:
    if not isinstance(tool, dict):
        raise invalid(path, "must be an object")
    if tool.get("type") != "function":
        raise invalid(f"{path}.type", 'must be "function"')
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{path}.function", "is required and must be an object")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"{path}.function.name", "is required: 1 to 64 characters of [a-zA-Z0-9_.-]")
    description, strict = function.get("description"), function.get("strict")
    if description is not None and not isinstance(description, str):
        raise invalid(f"{path}.function.description", "must be a string")
    if strict is not None and not isinstance(strict, bool):
        raise invalid(f"{path}.function.strict", "must be true or false")
    param = f"{path}.function.parameters"
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, dict):
        raise invalid(param, "must be a JSON schema, which is an object")
    check_nesting(param, parameters, limits)
    if (size := len(orjson.dumps(parameters))) > limits.max_grammar_bytes:
        raise invalid(param, f"must be at most {limits.max_grammar_bytes} bytes, not {size}")
    check_schema(param, parameters)
    if parameters.get("type", "object") != "object":
        raise invalid(f"{param}.type", 'must be "object"')
    shown = {"name": name, "description": description or "", "parameters": parameters}
    return Tool(name, parameters, bool(strict), {"type": "function", "function": shown})
