"""response_format and structured_outputs: what is taken, what is refused and in which words, and what workers get."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from helpers.gateway_api import Gateway, chat_body, completion_body
from helpers.waiting import eventually

from baton.services.engine.grammar import GrammarCompiler
from baton.services.gateway import grammar_checks
from baton.services.gateway.grammar_helper import TOO_LONG

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
CHAIN = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} "x"' for i in range(12_000)) + '\nr12000: "a"'


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": FORMAT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"regex": r"a/b\d+"}},
        {"structured_outputs": {"choice": ["yes", 'n"o']}},
        {"structured_outputs": {"grammar": 'start: "a" | "b"'}},
        {"structured_outputs": {"grammar": '{"grammars": [{"lark_grammar": "start: \\"a\\""}]}'}},
        {"structured_outputs": {"regex": "a", "choice": None}, "response_format": {"type": "text"}},
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_workers_get_a_grammar(
    gateway: Gateway, client: httpx.AsyncClient, fields: dict[str, Any], path: str
) -> None:
    body = (chat_body if "chat" in path else completion_body)(**fields)
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    grammar = json.loads(gateway.dispatcher.requests[-1].sampling.grammar or "")
    assert [part["name"] for part in grammar["grammars"]] == ["baton_start", "answer"]


async def test_without_them_there_is_no_grammar(gateway: Gateway, client: httpx.AsyncClient) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"structured_outputs": None}):
        assert (await client.post("/v1/chat/completions", json=chat_body(**fields))).status_code == 200
        assert gateway.dispatcher.requests[-1].sampling.grammar is None


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def wanted(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


AT_SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {}}, "response_format.type", "json_schema"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, AT_SCHEMA, "required"),
        (wanted("text"), AT_SCHEMA, "JSON schema"),
        (wanted({"type": "foo"}), AT_SCHEMA, "foo"),
        (wanted(deep(400)), AT_SCHEMA, "100 levels"),
        (wanted({"enum": []}), AT_SCHEMA, "cannot be used"),
        (wanted({"$ref": "http://169.254.169.254/x"}), AT_SCHEMA, "cannot be used"),
        (wanted({"$ref": "#/nowhere"}), AT_SCHEMA, "cannot be used"),
        (wanted({"enum": ["v" * 300_000]}), AT_SCHEMA, "262144 bytes"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}, "strict": True}}},
            AT_SCHEMA,
            "not",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex", "cannot be used"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "not empty"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "string"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice", "strings"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "true"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar", "cannot be used"),
        ({"structured_outputs": {"grammar": "start: a\na: a"}}, "structured_outputs.grammar", "cannot be used"),
        ({"structured_outputs": {"grammar": '{"grammars": []}'}}, "structured_outputs.grammar", "Lark"),
        ({"structured_outputs": {"grammar": '{"grammars": [{"name": "a b"}]}'}}, "structured_outputs.grammar", "name"),
        ({"structured_outputs": {"grammar": CHAIN}}, "structured_outputs.grammar", "nested too deeply"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs", "combined"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "grammar"),
    ],
)
async def test_what_cannot_be_followed_is_refused_by_name_and_the_next_request_is_served(
    gateway: Gateway, client: httpx.AsyncClient, fields: dict[str, Any], param: str, words: str
) -> None:
    response = await client.post("/v1/chat/completions", json=chat_body(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 600
    assert not gateway.dispatcher.requests
    assert (await client.post("/v1/chat/completions", json=chat_body(response_format=FORMAT))).status_code == 200


async def test_a_grammar_that_compiles_for_long_is_cut_off(gateway: Gateway, client: httpx.AsyncClient) -> None:
    properties = {f"p{i}": {"type": "string", "pattern": f"^[a-z]{{{i % 9},40}}x$"} for i in range(3500)}
    response = await client.post("/v1/chat/completions", json=chat_body(**wanted({"properties": properties})))
    assert response.status_code == 400
    assert TOO_LONG in response.json()["error"]["message"]


async def test_what_was_tried_out_is_remembered(gateway: Gateway, client: httpx.AsyncClient) -> None:
    await client.post("/v1/chat/completions", json=chat_body(response_format=FORMAT))
    gateway.deps.grammars.close()  # nobody is left to ask
    assert (await client.post("/v1/chat/completions", json=chat_body(response_format=FORMAT))).status_code == 200


async def test_a_helper_that_is_killed_is_replaced(gateway: Gateway, client: httpx.AsyncClient) -> None:
    body = chat_body(structured_outputs={"regex": "a+"})
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    for helper in gateway.deps.grammars._helpers:
        helper._process.kill()
        await eventually(lambda helper=helper: not helper.is_alive, what="the helper's end")
    for index in range(3):
        body = chat_body(structured_outputs={"regex": f"b{index}"})
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_the_gateway_answers_others_while_a_grammar_is_tried_out(
    gateway: Gateway, client: httpx.AsyncClient
) -> None:
    properties = {f"p{i}": {"type": "string", "pattern": f"^[a-z]{{{i % 9},40}}y$"} for i in range(3500)}
    slow = asyncio.create_task(
        client.post("/v1/chat/completions", json=chat_body(**wanted({"properties": properties})), timeout=60)
    )
    await eventually(lambda: gateway.deps.grammars._num_waiting == 1, what="the grammar's check")
    answered = 0
    while not slow.done() and answered < 3:
        assert (await client.get("/health")).status_code == 200
        answered += 1
    assert answered == 3
    await slow


async def test_when_too_many_grammars_wait_the_next_is_told_to_come_again(
    gateway: Gateway, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checks, "MAX_WAITING", 0)
    response = await client.post("/v1/chat/completions", json=chat_body(structured_outputs={"regex": "z+"}))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200  # nothing to wait for


@pytest.mark.parametrize("option", ["", "%llguidance {}\n", '%llguidance {"no_forcing": false}\n'])
async def test_text_that_a_grammar_leaves_no_choice_about_is_not_worked_out_ahead(
    gateway: Gateway, client: httpx.AsyncClient, option: str
) -> None:
    """Behind the first "a" of this one only another can follow, for ever."""
    body = chat_body(structured_outputs={"grammar": option + 'start: "b" | A A\nA: /a+/'})
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    grammar = gateway.dispatcher.requests[-1].sampling.grammar or ""
    ends = gateway.deps.model.eos_token_ids
    compiler = GrammarCompiler(gateway.deps.tokenizer.as_json, gateway.deps.model.vocab_size)
    matcher = compiler.prepare(grammar, ends).result(60)
    for _ in range(3):
        assert any(compiler.submit(matcher.compute_bitmask).result(60))
        assert matcher.consume_token(gateway.dispatcher.token("a"))
    compiler.close()
