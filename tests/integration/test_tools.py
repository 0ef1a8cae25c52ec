"""Tools and structured outputs through ``baton serve``, as the openai client sees them. The model is random: what fits does so
because it must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers.serving import Serving, serving
from helpers.tiny_models import CHAT_TEMPLATE, make_model_dir

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    + CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message.content }}{{ message.tool_calls | default('') }}")
    + "{# <tool_call> #}"
)
CITIES = ["Oslo", "Rome"]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
MESSAGES: Any = [{"role": "user", "content": "the code for the door"}]
OPTIONS = ("--kv-cache-memory", "32MiB", "--dtype", "float32", "--served-model-name", "tiny")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder: Path = make_model_dir("llama", tmp_path_factory.mktemp("model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    with serving("--model", str(folder), *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client


def check_call(name: str, arguments: str) -> None:
    values = json.loads(arguments)
    assert name == "get_weather"
    assert values.keys() == {"city", "days"}
    assert values["city"] in CITIES
    assert values["days"] in (1, 2, 3)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str)
def test_a_random_model_calls_a_tool_when_it_must(server: Serving, client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=700,
        seed=3,
    )
    (found,) = answer.choices
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls or ()
    assert call.type == "function"
    check_call(call.function.name, call.function.arguments)
    receipt = server.get(f"/v1/requests/{answer.id.removeprefix('chatcmpl-')}").json()
    assert receipt["outcome"] == "tool_calls"
    assert receipt["decision"]["mode"] == "remote"  # the first token came from the prefill worker


def test_streamed_calls_and_the_turn_after_them(client: openai.OpenAI) -> None:
    name, call_id, arguments, reasons = "", "", "", []
    fields: Any = {"parallel_tool_calls": False, "max_tokens": 700, "seed": 5, "tool_choice": "required"}
    with client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, stream=True, **fields) as stream:
        for chunk in stream:
            reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                name, call_id = call.function.name or name, call.id or call_id
                arguments += call.function.arguments or ""
    assert reasons == ["tool_calls"]
    check_call(name, arguments)
    turn = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [turn]}]
    messages.append({"role": "tool", "tool_call_id": call_id, "content": "rain"})
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"


def test_a_json_schema_and_its_logprobs(client: openai.OpenAI) -> None:
    schema = {"name": "weather", "schema": PARAMETERS, "strict": True}
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[typeddict-item]
        logprobs=True,
        top_logprobs=2,
        max_tokens=700,
        temperature=0,
    )
    (found,) = answer.choices
    assert found.finish_reason == "stop"
    check_call("get_weather", found.message.content or "")
    assert found.logprobs is not None
    tokens = found.logprobs.content or []
    assert len(tokens) == (answer.usage.completion_tokens if answer.usage else 0)
    assert all(-9999.0 < token.logprob <= 0 for token in tokens)


def test_bad_schemas_reach_no_worker_and_the_next_request_is_served(client: openai.OpenAI) -> None:
    for schema in ({"type": "foo"}, {"enum": []}, {"$ref": "#/nowhere"}):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, extra_body={"structured_outputs": {"json": schema}}
            )
        assert error.value.param == "structured_outputs.json"
    answer = client.completions.create(
        model="tiny", prompt="the door", max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert answer.choices[0].text in ("yes", "no")
