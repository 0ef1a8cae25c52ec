"""Streams are read however their bytes are cut."""

from __future__ import annotations

import pytest

from baton.load.generator.events import EventSplitter, error_words, read_event

STREAM = b': comment\r\nevent: x\ndata: {"a":1}\n\ndata:{"b":2}\r\n\r\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 7, len(STREAM)])
def test_events_are_the_same_in_pieces_of_any_size(size: int) -> None:
    splitter = EventSplitter()
    found = [line for at in range(0, len(STREAM), size) for line in splitter.feed(STREAM[at : at + size])]
    assert found == [b'{"a":1}', b'{"b":2}', b"[DONE]"]


@pytest.mark.parametrize(
    ("data", "has_output", "text"),
    [
        (b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}', False, ""),
        (b'{"choices": [{"delta": {"content": "hi"}}]}', True, "hi"),
        (b'{"choices": [{"delta": {"reasoning_content": "hm"}}]}', True, ""),
        (b'{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}', True, ""),
        (b'{"choices": [{"text": "", "token_ids": [7]}]}', True, ""),
        (b'{"choices": [{"text": ""}]}', False, ""),
        (b'{"choices": [], "usage": {"prompt_tokens": 3}}', False, ""),
    ],
)
def test_output_is_text_reasoning_tool_calls_or_token_ids(data: bytes, has_output: bool, text: str) -> None:
    event = read_event(data)
    assert (event.has_output, event.text) == (has_output, text)


def test_ends_usage_and_errors_are_told_apart() -> None:
    assert read_event(b"[DONE]").is_done
    assert read_event(b'{"choices": [{"text": "", "finish_reason": "length"}]}').is_finished
    assert read_event(b'{"choices": [], "usage": {"prompt_tokens": 3}}').usage == {"prompt_tokens": 3}
    assert read_event(b'{"error": {"message": "too\\nlong"}}').error == "too long"
    for bad in (b"{", b"[1]"):
        with pytest.raises(ValueError):
            read_event(bad)


@pytest.mark.parametrize(
    ("content", "words"), [({"error": "x"}, "x"), ({"detail": 1}, "{'detail': 1}"), ("<html>", "<html>")]
)
def test_error_bodies_of_any_shape_have_words(content: object, words: str) -> None:
    assert error_words(content) == words
