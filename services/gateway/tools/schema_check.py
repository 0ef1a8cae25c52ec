"""Whether a JSON schema is one, as far as tools need it to be: types, and where schemas stand in it."""

from __future__ import annotations

from typing import Any

from baton.services.gateway.errors import invalid

_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_SCHEMAS = ("additionalProperties", "items", "contains", "propertyNames", "not", "if", "then", "else")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def check_schema(param: str, schema: Any) -> None:
    """Raises INVALID_REQUEST naming the place, "tools[0].function.parameters.properties.city.type" say."""
    waiting = [(param, schema)]
    while waiting:
        path, current = waiting.pop()
        if isinstance(current, bool):
            continue
        if not isinstance(current, dict):
            raise invalid(_short(path), "must be a JSON schema, which is an object")
        _check_keywords(path, current)
        for name in _SCHEMAS:
            value = current.get(name)
            if name == "items" and isinstance(value, list):
                waiting += [(f"{path}.items[{i}]", item) for i, item in enumerate(value)]
            elif value is not None:
                waiting.append((f"{path}.{name}", value))
        for name in _LISTS:
            if name in current:
                if not isinstance(current[name], list) or not current[name]:
                    raise invalid(_short(f"{path}.{name}"), "must be a list of schemas, at least one")
                waiting += [(f"{path}.{name}[{i}]", item) for i, item in enumerate(current[name])]
        for name in _MAPS:
            if name in current:
                if not isinstance(current[name], dict):
                    raise invalid(_short(f"{path}.{name}"), "must be an object of schemas")
                waiting += [(f"{path}.{name}.{key}", item) for key, item in current[name].items()]


def _check_keywords(path: str, schema: dict[str, Any]) -> None:
    kinds = schema.get("type", "object")
    if not all(isinstance(kind, str) and kind in _TYPES for kind in (kinds if isinstance(kinds, list) else [kinds])):
        raise invalid(_short(f"{path}.type"), f"must be of {', '.join(sorted(_TYPES))}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise invalid(_short(f"{path}.required"), "must be a list of strings")
    if not isinstance(schema.get("enum", [0]), list) or schema.get("enum") == []:
        raise invalid(_short(f"{path}.enum"), "must be a list, not empty")
    for name in ("pattern", "$ref", "format", "description"):
        if not isinstance(schema.get(name, ""), str):
            raise invalid(_short(f"{path}.{name}"), "must be a string")
    for names, kind, words in ((_COUNTS, int, "an integer, at least 0"), (_NUMBERS, int | float, "a number")):
        for name in names:
            value = schema.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, kind) or (kind is int and value < 0):
                raise invalid(_short(f"{path}.{name}"), f"must be {words}")


def _short(path: str) -> str:
    return path if len(path) <= 200 else path[:197] + "..."
