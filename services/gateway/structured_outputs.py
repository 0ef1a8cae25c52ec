"""response_format and structured_outputs: from the fields of a body to a grammar.

Nothing is compiled here; ``grammar_checks.py`` has that done where it can do no harm.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
from llguidance import LLMatcher

from baton.services.gateway.errors import invalid
from baton.services.gateway.grammar import Grammar
from baton.services.gateway.limits import Limits
from baton.services.gateway.openai_models import GenerationBody

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_ANY_OBJECT = {"type": "object"}
# Between two tokens of JSON. A model that likes white space would otherwise fill its whole answer with it.
_WHITE_SPACE = r"[ \n\r\t]{1,40}"
MAX_CHOICES = 4096
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")


def parse_grammar(body: GenerationBody, limits: Limits) -> Grammar | None:
    """What the output must match; None: anything. Raises INVALID_REQUEST."""
    formats = parse_response_format(body.response_format, limits)
    outputs = parse_structured_outputs(body.structured_outputs, limits)
    if formats is not None and outputs is not None:
        raise invalid("structured_outputs", "cannot be combined with a response_format other than text")
    return formats or outputs


def parse_response_format(value: dict[str, Any] | None, limits: Limits) -> Grammar | None:
    """None for plain text. Raises INVALID_REQUEST."""
    if value is None:
        return None
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return json_grammar("response_format", _ANY_OBJECT, limits, lenient=True)
        case "json_schema":
            asked = value.get("json_schema")
            if not isinstance(asked, dict):
                raise invalid("response_format.json_schema", "is required and must be an object")
            strict = asked.get("strict")
            if strict is not None and not isinstance(strict, bool):
                raise invalid("response_format.json_schema.strict", "must be true or false")
            param = "response_format.json_schema.schema"
            if asked.get("schema") is None:
                raise invalid(param, "is required")
            return json_grammar(param, asked["schema"], limits, lenient=not strict)
        case _:
            raise invalid("response_format.type", 'must be "text", "json_object" or "json_schema"')


def parse_structured_outputs(value: dict[str, Any] | None, limits: Limits) -> Grammar | None:
    """Of vLLM's field, the kinds in ``_KINDS``, one at a time. Raises INVALID_REQUEST."""
    if value is None:
        return None
    given = [name for name, content in value.items() if content is not None]
    for name in given:
        if name not in _KINDS:
            raise invalid("structured_outputs", f"may have one of {', '.join(_KINDS)}, not {name[:40]!r}")
    if len(given) != 1:
        raise invalid("structured_outputs", f"must have exactly one of {', '.join(_KINDS)}, not {len(given)}")
    kind, content = given[0], value[given[0]]
    param = f"structured_outputs.{kind}"
    match kind:
        case "json":
            return json_grammar(param, content, limits, lenient=True)
        case "json_object":
            if content is not True:
                raise invalid(param, "must be true")
            return json_grammar(param, _ANY_OBJECT, limits, lenient=True)
        case "regex":
            made = LLMatcher.grammar_from_regex(_text(param, content, limits))
            return lark_grammar(param, json.loads(made)["grammars"][0]["lark_grammar"])
        case "choice":
            return _choice(param, content, limits)
        case _:
            return _given_grammar(param, _text(param, content, limits), limits)


def json_grammar(param: str, schema: Any, limits: Limits, *, lenient: bool, name: str = "answer") -> Grammar:
    """JSON that matches a schema, given as an object or as text. ``lenient``: keywords that cannot be enforced are ignored."""
    if isinstance(schema, str):
        _check_size(param, len(schema.encode()), limits)
        try:
            schema = orjson.loads(schema)
        except orjson.JSONDecodeError:
            raise invalid(param, "must be a JSON schema") from None
    if not isinstance(schema, dict):
        raise invalid(param, "must be a JSON schema, which is an object")
    check_nesting(param, schema, limits)
    guidance = {"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}
    try:
        size = len(orjson.dumps(schema))
    except TypeError:
        raise invalid(param, "must be a JSON schema") from None
    _check_size(param, size, limits)
    return Grammar(param, ({"name": name, "json_schema": schema | {"x-guidance": guidance}},))


def lark_grammar(param: str, rules: str, name: str = "answer") -> Grammar:
    """Lark as llguidance reads it."""
    return Grammar(param, ({"name": name, "lark_grammar": rules},))


def check_nesting(param: str, value: Any, limits: Limits) -> None:
    """Raises INVALID_REQUEST for what is nested too deeply. Does not recurse itself."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > limits.max_schema_depth:
            raise invalid(param, f"is nested more than {limits.max_schema_depth} levels deep")
        below: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            below += [child for child in children if isinstance(child, dict | list)]
        level = below


def _choice(param: str, content: Any, limits: Limits) -> Grammar:
    if not isinstance(content, list) or not content or not all(isinstance(one, str) and one for one in content):
        raise invalid(param, "must be a list of strings, at least one, none of them empty")
    if len(content) > MAX_CHOICES:
        raise invalid(param, f"must be at most {MAX_CHOICES} strings, not {len(content)}")
    _check_size(param, sum(len(one.encode()) for one in content), limits)
    return lark_grammar(param, "start: " + " | ".join(map(json.dumps, content)))


def _given_grammar(param: str, text: str, limits: Limits) -> Grammar:
    """Lark, or llguidance's own JSON."""
    if not text.lstrip().startswith("{"):
        return lark_grammar(param, text)
    try:
        parts = orjson.loads(text)["grammars"]
        check_nesting(param, parts, limits)
        named = [dict(part) for part in parts]
        first = {"name": "answer"} | {key: value for key, value in named[0].items() if value is not None}
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, IndexError):
        raise invalid(param, "must be Lark, or llguidance's JSON: an object with grammars, a list of objects") from None
    if not isinstance(first["name"], str) or not _NAME.fullmatch(first["name"]):
        raise invalid(param, "has a grammar whose name is not made of a-z, 0-9 and _")
    return Grammar(param, (first, *named[1:]))


def _text(param: str, content: Any, limits: Limits) -> str:
    if not isinstance(content, str) or not content:
        raise invalid(param, "must be a string, not empty")
    _check_size(param, len(content.encode()), limits)
    return content


def _check_size(param: str, size: int, limits: Limits) -> None:
    if size > limits.max_grammar_bytes:
        raise invalid(param, f"must be at most {limits.max_grammar_bytes} bytes, not {size}")
