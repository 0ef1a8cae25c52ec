"""Parsers of tool calls: each format, what only looks like a call, and texts cut anywhere."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.services.gateway.tools.calls import CallArguments, CallParser, CallStart, Piece, Text, joined
from baton.services.gateway.tools.formats import HermesParser, Llama3JsonParser, MistralParser
from baton.services.gateway.tools.pythonic import PythonicParser

NAMES = frozenset({"get_weather", "now", "a.b"})
PARSERS = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}


def read(parser: CallParser, *texts: str) -> list[Piece]:
    pieces = [piece for text in texts for piece in parser.feed(text)]
    return joined(pieces + parser.finish())


def parse(format_name: str, *texts: str) -> tuple[str, list[tuple[str, Any]]]:
    """The content, and name and arguments of each call, which must come in order."""
    content, calls = "", list[list[str]]()
    for piece in read(PARSERS[format_name](NAMES), *texts):
        match piece:
            case Text(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[index][1] += text
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


OSLO = ("get_weather", {"city": "Oslo", "days": 2})
NOW = ("now", {})


@pytest.mark.parametrize(
    ("format_name", "text", "content", "calls"),
    [
        (
            "hermes",
            'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
            "I look.",
            [OSLO],
        ),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n'
            '<tool_call>\n{"arguments": {"city": "Oslo", "days": 2}, "name": "get_weather"}\n</tool_call>\n',
            "",
            [NOW, OSLO],
        ),
        ("hermes", '<tool_call>{"name": "now"}</tool_call> and more', "and more", [NOW]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [NOW]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}', "", [NOW]),  # it forgot to close
        ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}', "", [OSLO]),
        ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}; {"name":"now","arguments":{}}', "", [NOW, NOW]),
        ("llama3_json", '{"name": "now", "parameters": {}}\n{"name": "now", "parameters": {}}', "", [NOW, NOW]),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": '
         '{"city": "Oslo", "days": 2}, "id": "123456789"}]', "", [NOW, OSLO]),
        ("mistral", 'Well. [TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 2}[TOOL_CALLS]now{}', "Well.", [OSLO, NOW]),
        ("mistral", "[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}", "", [NOW]),
        ("pythonic", '[get_weather(city="Oslo", days=2)]', "", [OSLO]),
        ("pythonic", "<|python_start|>[now(), get_weather(city='Oslo', days=2)]<|python_end|>", "", [NOW, OSLO]),
        (
            "pythonic",
            '[get_weather(a=[1, -2.5, (True, None)], b={"x": "]),("}, c="\\"\\u00e9\\n"), a.b(x = false )]',
            "",
            [("get_weather", {"a": [1, -2.5, [True, None]], "b": {"x": "]),("}, "c": '"é\n'}), ("a.b", {"x": False})],
        ),
    ],
)  # fmt: skip
def test_calls_are_read(format_name: str, text: str, content: str, calls: list[Any]) -> None:
    assert parse(format_name, text) == (content, calls)
    assert parse(format_name, *text) == (content, calls)


@pytest.mark.parametrize(
    ("format_name", "text"),
    [
        ("hermes", "no call at all  \n"),
        ("hermes", "a < b, <tool and </tool_call>\n"),
        ("hermes", 'before \n <tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>\n'),
        ("hermes", "say <tool_call> hello </tool_call> twice"),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "argu'),
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>["<tool_call>{'),
        ("llama3_json", "Hello {name}"),
        ("llama3_json", ' {"name": "Ann", "age": 3} '),
        ("llama3_json", '{"name": "now", "parameters": 5}'),
        ("llama3_json", '<|python_tag|>print("x")'),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral", '[TOOL_CALLS][{"name": "rm", "arguments": {}}]'),
        ("mistral", 'list [1, 2] and {"a": 1}'),
        ("pythonic", "[1, 2, 3]"),
        ("pythonic", "[rm(x=1)]"),
        ("pythonic", "[now(1)]"),
        ("pythonic", "[now(x=y)]"),
        ("pythonic", '[now(x="1'),
        ("pythonic", "Hello [now()]"),
        ("pythonic", "[now(x=open('/etc/passwd'))]"),
        ("pythonic", "[now(x=" + "[" * 500 + "]" * 500 + ")]"),
    ],
)
def test_what_only_looks_like_a_call_is_given_back_whole(format_name: str, text: str) -> None:
    assert parse(format_name, text) == (text, [])
    assert parse(format_name, *text) == (text, [])


def test_arguments_are_told_as_they_come() -> None:
    parser = HermesParser(NAMES)
    parser.feed('<tool_call>{"name": "get_weather", "arguments": {"ci')
    assert parser.feed('ty": "Os') == [CallArguments(0, 'ty": "Os')]
    assert parser.feed('lo"}') == [CallArguments(0, 'lo"}')]
    assert parser.feed("}\n</tool_call>") == []
    assert parser.finish() == []


def test_text_is_told_as_it_comes() -> None:
    for format_name, make in PARSERS.items():
        parser = make(NAMES)
        told = parser.feed("Hello") + parser.feed(" world")
        assert joined(told) == [Text("Hello world")], format_name


def test_a_call_that_breaks_off_keeps_what_was_told_and_the_rest_is_text() -> None:
    pieces = read(HermesParser(NAMES), '<tool_call>{"name": "now", "arguments": {"x": oops}}</tool_call>')
    assert pieces == [CallStart(0, "now"), CallArguments(0, '{"x": '), Text("oops}}</tool_call>")]


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<|python_start|>", "<|python_end|>"),
    *('{"name": "now", "arguments": {}}', '{"name": "get_weather", "parameters": {"a": [1, "x\\"]"], "b": null}}'),
    *('{"name": "rm", "arguments": {}}', '{"arguments": {"z": {}}, "name": "now"}', '{"name": "now", "arguments": {"a": '),
    *("now", "now()", "get_weather(", "a=1", 'b="x, y)"', "now(c={'d': [1, (2,)]})"),
    *("[", "]", "{", "}", ",", ";", "(", ")", '"', "'"),
    *(" ", "\n", "text", "<", "\\", "1.5", "true", "é🙂", '{"a": "<tool_call>"}'),
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@given(format_name=st.sampled_from(sorted(PARSERS)), text=texts, data=st.data())
@settings(max_examples=150, deadline=None)
def test_however_a_text_is_cut_the_same_comes_out(format_name: str, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    whole = read(PARSERS[format_name](NAMES), text)
    assert read(PARSERS[format_name](NAMES), *parts) == whole
    assert read(PARSERS[format_name](NAMES), *text) == whole
    told = "".join(piece.text for piece in whole if isinstance(piece, Text))
    if not any(isinstance(piece, CallStart) for piece in whole):
        assert told == text
    for piece in whole:
        if isinstance(piece, CallStart):
            assert piece.name in NAMES


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
arguments_of_calls = st.lists(
    st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), values, max_size=4), min_size=1, max_size=3
)


def written(format_name: str, calls: list[dict[str, Any]]) -> str:
    """The calls as a model of that format writes them."""
    objects = [json.dumps({"name": "now", "arguments": arguments}) for arguments in calls]
    match format_name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
        case "llama3_json":
            return "; ".join(objects)
        case "mistral":
            return f"[TOOL_CALLS][{', '.join(objects)}]"
        case _:
            listed = (", ".join(f"{key}={value!r}" for key, value in arguments.items()) for arguments in calls)
            return f"[{', '.join(f'now({one})' for one in listed)}]"


@given(format_name=st.sampled_from(sorted(PARSERS)), calls=arguments_of_calls)
@settings(max_examples=100, deadline=None)
def test_what_a_model_writes_is_what_the_client_reads(format_name: str, calls: list[dict[str, Any]]) -> None:
    assert parse(format_name, written(format_name, calls)) == ("", [("now", arguments) for arguments in calls])
