"""A, continued: tools and structured outputs, and how they are refused."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.api_client import CHAT, Api, error_of

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def named(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "x", "parameters": parameters}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "auto"},
        {"tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TOOL], "tool_choice": "perhaps"},
        {"tools": "weather"},
        {"tools": [{"type": "function"}]},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_b025_tools_that_make_no_sense(api: Api, fields: dict[str, Any]) -> None:
    api.refuses(CHAT, **fields)


def test_b026_tools_without_a_choice_are_the_models_own(api: Api) -> None:
    response = api.post(CHAT, api.body(CHAT, tools=[TOOL]))
    if response.status_code == 400:  # a server that has no parser for this model says so
        error_of(response)
        return
    assert response.status_code == 200
    auto = api.chat(tools=[TOOL], tool_choice="auto")
    assert response.json()["choices"] == auto["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [named({"type": "nonsense"})], "tool_choice": "required"},
        {"tools": [named([])]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        {"response_format": {"type": "yaml"}},
    ],
    ids=lambda fields: str(fields)[:60],
)  # fmt: skip
def test_b027_schemas_and_formats_that_make_no_sense(api: Api, fields: dict[str, Any]) -> None:
    api.refuses(CHAT, **fields)


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": "("},
        {"grammar": "start: ("},
        {"regex": "a", "choice": ["b"]},
        {"choice": []},
        {"json": {"type": "nonsense"}},
    ],
    ids=str,
)
def test_b028_constraints_that_make_no_sense(api: Api, outputs: dict[str, Any]) -> None:
    api.refuses(CHAT, structured_outputs=outputs)


def test_b028_constraints_that_do_are_kept(api: Api) -> None:
    choice = api.chat(structured_outputs={"choice": ["yes, of course", "not at all"]}, max_tokens=30)["choices"][0]
    assert choice["message"]["content"] in ("yes, of course", "not at all")
    number = api.chat(structured_outputs={"regex": "[0-9]{3}-[0-9]{2}"}, max_tokens=30)["choices"][0]["message"][
        "content"
    ]
    assert len(number) == 6
    assert number.replace("-", "").isdigit()
