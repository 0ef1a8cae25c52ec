"""Which format a model writes calls in, and the grammar of calls in each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.services.gateway.grammar import Grammar
from baton.services.gateway.limits import Limits
from baton.services.gateway.structured_outputs import json_grammar
from baton.services.gateway.tools.calls import CallParser
from baton.services.gateway.tools.formats import HermesParser, Llama3JsonParser, MistralParser
from baton.services.gateway.tools.offer import Tool, ToolOffer
from baton.services.gateway.tools.pythonic import PythonicParser

# From a marker to what stands for it in a rule: its text, or its token where the vocabulary keeps it for that alone.
Marker = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """``markers``: texts that some vocabularies keep as special tokens, which the parser must see all the same."""

    name: str
    parser: Callable[[frozenset[str]], CallParser]
    markers: tuple[str, ...]
    signs: tuple[str, ...]  # any of them in a chat template gives the format away
    frame: tuple[str, str, str]  # before the first call, between calls, behind the last
    has_short_ids: bool = False  # its template takes ids of nine letters and digits only

    def grammar(self, offer: ToolOffer, limits: Limits, marker: Marker, name: str = "calls") -> Grammar:
        """Exactly what the parser reads: one call at least, with arguments that match its schema."""
        before, between, behind = (_literal(text, marker) for text in self.frame)
        rules, parts = [], list[dict[str, Any]]()
        for number, tool in enumerate(offer.usable):
            rule, schemas = _RULES[self.name](tool, f"{name}_{number}", marker, limits)
            rules.append(f"call_{number}: {rule}")
            parts += [part for grammar in schemas for part in grammar.parts]
        call = " | ".join(f"call_{number}" for number in range(len(rules)))
        more = f" ({between} call)*" if offer.max_calls is None else ""
        start = " ".join(part for part in (before, f"call{more}", behind) if part)
        text = "\n".join([f"start: {start}", f"call: {call}", *rules])
        return Grammar("tools", ({"name": name, "lark_grammar": text}, *parts))


def _arguments(tool: Tool, name: str, limits: Limits) -> Grammar:
    schema = {"type": "object"} | tool.parameters
    return json_grammar("tools", schema, limits, lenient=not tool.is_strict, name=name)


def _hermes(tool: Tool, name: str, marker: Marker, limits: Limits) -> tuple[str, list[Grammar]]:
    head = json.dumps(f'\n{{"name": {json.dumps(tool.name)}, "arguments": ')
    opening, closing = marker("<tool_call>"), marker("</tool_call>")
    return f'{opening} {head} @{name} "}}\\n" {closing}', [_arguments(tool, name, limits)]


def _llama3(tool: Tool, name: str, marker: Marker, limits: Limits) -> tuple[str, list[Grammar]]:
    head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
    return f'{head} @{name} "}}"', [_arguments(tool, name, limits)]


def _mistral(tool: Tool, name: str, marker: Marker, limits: Limits) -> tuple[str, list[Grammar]]:
    head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
    return f'{head} @{name} "}}"', [_arguments(tool, name, limits)]


def _pythonic(tool: Tool, name: str, marker: Marker, limits: Limits) -> tuple[str, list[Grammar]]:
    """Keywords in the order of the schema, the required ones first; values as JSON, which the parser reads as well."""
    properties = tool.parameters.get("properties", {})
    required = [key for key in properties if key in tool.parameters.get("required", [])]
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    rule, schemas = "", list[Grammar]()
    for number, key in enumerate([*required, *(key for key in properties if key not in required)]):
        schema = properties[key] if isinstance(properties[key], dict) else {}
        part = f"{name}_{number}"
        schemas.append(json_grammar("tools", shared | schema, limits, lenient=not tool.is_strict, name=part))
        argument = f"{json.dumps((', ' if number else '') + key + '=')} @{part}"
        # An optional one may only follow those before it: the comma is theirs.
        rule += f" {argument}" if key in required else f" ({argument}"
    rule += ")?" * (len(properties) - len(required))
    return f'{json.dumps(tool.name + "(")}{rule} ")"', schemas


def _literal(text: str, marker: Marker) -> str:
    """``text`` in a rule; a marker at its beginning may be a token."""
    for known in ("[TOOL_CALLS]",):
        if text.startswith(known):
            return f"{marker(known)} {_literal(text[len(known) :], marker)}"
    return json.dumps(text) if text else ""


_RULES = {"hermes": _hermes, "llama3_json": _llama3, "mistral": _mistral, "pythonic": _pythonic}
FORMATS = {
    "hermes": ToolFormat("hermes", HermesParser, ("<tool_call>", "</tool_call>"), ("<tool_call>",), ("", "\n", "")),
    "mistral": ToolFormat(
        "mistral",
        MistralParser,
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        ("[TOOL_CALLS]",),
        ("[TOOL_CALLS][", ", ", "]"),
        has_short_ids=True,
    ),
    "pythonic": ToolFormat(
        "pythonic",
        PythonicParser,
        ("<|python_start|>", "<|python_end|>"),
        ("<|python_start|>", "[func_name1("),
        ("[", ", ", "]"),
    ),
    "llama3_json": ToolFormat(
        "llama3_json", Llama3JsonParser, ("<|python_tag|>",), ("<|python_tag|>", '"parameters": '), ("", "; ", "")
    ),
}  # the surest signs first


def find_format(asked: str, chat_template: str) -> ToolFormat | None:
    """``asked``: a name, none, or auto: what the chat template gives away."""
    if asked != "auto":
        return FORMATS.get(asked)
    return next((one for one in FORMATS.values() if any(sign in chat_template for sign in one.signs)), None)
