"""Request bodies in the OpenAPI page. Handlers read bodies themselves, so FastAPI does not know their models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

_TEXT: dict[str, Any] = {"type": "string"}
_OPENAI_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _TEXT},
        }
    },
}
_ANTHROPIC_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "required": ["type", "message"], "properties": {"type": _TEXT, "message": _TEXT}},
    },
}
_ERROR_CONTENT = {"application/json": {"schema": {"anyOf": [_OPENAI_ERROR, _ANTHROPIC_ERROR]}}}
# Of every route.
ERROR_RESPONSES: Mapping[int | str, dict[str, Any]] = {
    "4XX": {"description": "Refused: the error says why, and which field is at fault.", "content": _ERROR_CONTENT},
    "503": {"description": "Not now: see Retry-After.", "content": _ERROR_CONTENT},
}


@cache
def json_request(body: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route whose JSON body is ``body``, with nested models in place."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inline(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        reference = node.get("$ref")
        if isinstance(reference, str):
            return _inline(definitions[reference.removeprefix("#/$defs/")], definitions)
        return {name: _inline(value, definitions) for name, value in node.items()}
    if isinstance(node, list):
        return [_inline(value, definitions) for value in node]
    return node
