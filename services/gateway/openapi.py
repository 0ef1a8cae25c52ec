"""Request bodies in the OpenAPI page. Handlers read bodies themselves, so FastAPI does not know their models."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel


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
