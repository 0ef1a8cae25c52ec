"""Client libraries as their users use them, unchanged: openai, anthropic, langchain-openai."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from helpers.api_client import MESSAGES, PROMPT, Api

CITIES = ("Ulm", "Rome")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": list(CITIES)}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
DESCRIPTION = "Tells the weather of a city."
FORCED: Any = {"type": "function", "function": {"name": "weather"}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": DESCRIPTION, "parameters": SCHEMA}}


class Trip(pydantic.BaseModel):
    """What the model is made to answer."""

    city: Literal["Ulm", "Rome"]
    days: Literal[1, 2, 3]


def check_arguments(arguments: Any) -> None:
    assert Trip.model_validate(json.loads(arguments) if isinstance(arguments, str) else arguments).city in CITIES


@pytest.fixture
def client(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.key or "none", max_retries=0, timeout=60.0) as made:
        yield made


@pytest.fixture
def claude(api: Api) -> Iterator[Any]:
    import anthropic

    if api.post("/v1/messages", {}).status_code == 404:
        pytest.skip("the server has no /v1/messages")
    with anthropic.Anthropic(base_url=api.url, api_key=api.key or "none", max_retries=0, timeout=60.0) as made:
        yield made


@pytest.fixture
def chain(api: Api) -> Any:
    import langchain_openai

    return langchain_openai.ChatOpenAI(
        model=api.model,
        base_url=f"{api.url}/v1",
        api_key=api.key or "none",
        max_retries=0,
        temperature=0,
        max_tokens=100,
        logit_bias={int(token): int(bias) for token, bias in api.without_space().items()},
    )  # type: ignore[call-arg]


def test_openai_chat_and_its_stream(client: openai.OpenAI, api: Api) -> None:
    asked: Any = {"model": api.model, "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert [model.id for model in client.models.list()]


def test_openai_tools(client: openai.OpenAI, api: Api) -> None:
    asked: Any = {"model": api.model, "messages": MESSAGES, "max_tokens": 100, "temperature": 0, "tools": [TOOL]}
    asked["logit_bias"] = api.without_space()
    whole = client.chat.completions.create(**asked, tool_choice=FORCED).choices[0].message
    assert whole.tool_calls
    check_arguments(whole.tool_calls[0].function.arguments)  # type: ignore[union-attr]
    with client.chat.completions.stream(**asked, tool_choice="required") as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    check_arguments(message.tool_calls[0].function.arguments)
    turns = [
        *MESSAGES,
        whole.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": "rain"},
    ]
    answered = client.chat.completions.create(**(asked | {"messages": turns, "max_tokens": 5}))
    assert answered.choices[0].finish_reason in ("stop", "length")


def test_openai_json_schema(client: openai.OpenAI, api: Api) -> None:
    parsed = client.chat.completions.parse(
        model=api.model,
        messages=MESSAGES,
        max_tokens=100,
        temperature=0,
        response_format=Trip,
        logit_bias=api.without_space(),  # type: ignore[arg-type]
    )
    assert isinstance(parsed.choices[0].message.parsed, Trip)


def test_openai_errors(client: openai.OpenAI, api: Api) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=api.model, messages=MESSAGES, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert client.chat.completions.create(model=api.model, messages=MESSAGES, max_tokens=1).choices


@pytest.fixture
def responses(client: openai.OpenAI, api: Api) -> Any:
    if api.post("/v1/responses", {}).status_code == 404:
        pytest.skip("the server has no /v1/responses")
    return client.responses


def test_openai_responses(responses: Any, api: Api) -> None:
    asked: Any = {"model": api.model, "input": PROMPT, "max_output_tokens": 40, "temperature": 0}
    whole = responses.create(**asked)
    assert whole.output_text
    assert whole.status in ("completed", "incomplete")
    with responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == f"response.{final.status}"
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens
    again = responses.create(
        **(asked | {"input": [{"role": "user", "content": PROMPT}, *whole.output, {"role": "user", "content": "And?"}]})
    )
    assert again.usage.input_tokens > whole.usage.input_tokens


def test_openai_responses_with_tools_and_a_schema(responses: Any, api: Api) -> None:
    tool = {"type": "function", "name": "weather", "description": DESCRIPTION, "parameters": SCHEMA, "strict": True}
    asked: Any = {"model": api.model, "input": PROMPT, "max_output_tokens": 100, "temperature": 0}
    asked["extra_body"] = {"logit_bias": api.without_space()}
    call = next(
        item
        for item in responses.create(**asked, tools=[tool], tool_choice="required").output
        if item.type == "function_call"
    )
    check_arguments(call.arguments)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    turns = [{"role": "user", "content": PROMPT}, call, output]
    assert responses.create(**(asked | {"input": turns, "max_output_tokens": 5}), tools=[tool]).output is not None
    assert isinstance(responses.parse(**asked, text_format=Trip).output_parsed, Trip)


def test_anthropic_messages_and_their_stream(claude: Any, api: Api) -> None:
    asked: Any = {
        "model": api.model,
        "max_tokens": 40,
        "messages": MESSAGES,
        "system": "You look things up.",
    }
    asked["extra_body"] = {"temperature": 0}
    whole = claude.messages.create(**asked)
    assert whole.content[0].text
    assert whole.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model=api.model, messages=MESSAGES, system="You look things up.")
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_anthropic_tools(claude: Any, api: Api) -> None:
    tool = {"name": "weather", "description": DESCRIPTION, "input_schema": SCHEMA}
    asked: Any = {"model": api.model, "max_tokens": 100, "messages": MESSAGES, "tools": [tool]}
    asked["extra_body"] = {"temperature": 0, "logit_bias": api.without_space()}
    whole = claude.messages.create(**asked, tool_choice={"type": "tool", "name": "weather"})
    call = next(block for block in whole.content if block.type == "tool_use")
    check_arguments(call.input)
    assert whole.stop_reason == "tool_use"
    with claude.messages.stream(**asked, tool_choice={"type": "any"}) as stream:
        streamed = next(block for block in stream.get_final_message().content if block.type == "tool_use")
    check_arguments(streamed.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    turns = [*MESSAGES, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    assert claude.messages.create(**(asked | {"messages": turns, "max_tokens": 5})).usage.output_tokens <= 5


def test_anthropic_errors(claude: Any, api: Api) -> None:
    import anthropic

    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(model=api.model, max_tokens=10**6, messages=MESSAGES)
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="no-such-model", max_tokens=1, messages=MESSAGES)
    if api.key is not None:
        with (
            anthropic.Anthropic(base_url=api.url, api_key="wrong", max_retries=0) as other,
            pytest.raises(anthropic.AuthenticationError),
        ):
            other.messages.create(model=api.model, max_tokens=1, messages=MESSAGES)
    assert claude.messages.create(model=api.model, max_tokens=1, messages=MESSAGES).content is not None


def test_langchain_chat_and_its_stream(chain: Any) -> None:
    whole = chain.invoke(PROMPT)
    assert whole.content
    assert "".join(chunk.content for chunk in chain.stream(PROMPT)) == whole.content
    assert whole.usage_metadata["input_tokens"] > 0


def test_langchain_tools_and_structured_output(chain: Any) -> None:
    def weather(city: Literal["Ulm", "Rome"], days: Literal[1, 2, 3]) -> str:
        """Tells the weather of a city."""
        return f"{city}: rain for {days} days"

    called = chain.bind_tools([weather], tool_choice="weather", strict=True).invoke(PROMPT)
    assert called.tool_calls[0]["name"] == "weather"
    check_arguments(called.tool_calls[0]["args"])
    for method in ("json_schema", "function_calling"):
        assert isinstance(chain.with_structured_output(Trip, method=method, strict=True).invoke(PROMPT), Trip)
