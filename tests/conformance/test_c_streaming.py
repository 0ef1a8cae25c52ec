"""C. Streaming."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from conformance.conftest import Owned
from helpers.api_client import CHAT, COMPLETIONS, Api, error_of
from helpers.waiting import eventually_sync

BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
STORY = "One day the fox went out to look for the old key of the house"


def whole_text(answer: dict[str, Any], index: int = 0) -> str:
    choice = next(choice for choice in answer["choices"] if choice["index"] == index)
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@BOTH
def test_b053_the_form_of_the_stream(api: Api, path: str) -> None:
    stream = api.stream(path)  # checks data lines and [DONE]
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert len({(event["id"], event["created"], event["model"]) for event in stream.events}) == 1
    expected = "chat.completion.chunk" if path == CHAT else "text_completion"
    assert {event["object"] for event in stream.events} == {expected}


def test_b054_the_role_comes_first_and_once_per_choice(api: Api) -> None:
    stream = api.stream(CHAT, n=2, temperature=0.8, seed=1)
    for index in (0, 1):
        deltas = [choice["delta"] for choice in stream.choice_events(index)]
        assert deltas[0]["role"] == "assistant"
        assert not deltas[0].get("content")
        assert not any("role" in delta and delta["role"] for delta in deltas[1:])


@BOTH
def test_b055_the_stream_says_what_the_whole_answer_says(api: Api, path: str) -> None:
    for fields in (
        {},
        {"prompt": STORY, "max_tokens": 40, "ignore_eos": True} if path == COMPLETIONS else {"max_tokens": 40},
    ):
        assert api.stream(path, **fields).text() == whole_text(api.ask(path, **fields))


@BOTH
def test_b056_one_finish_reason_and_it_comes_last(api: Api, path: str) -> None:
    stream = api.stream(path, n=3, temperature=0.8, seed=2)
    for index in range(3):
        reasons = [choice["finish_reason"] for choice in stream.choice_events(index)]
        assert reasons[-1] in ("stop", "length")
        assert not any(reasons[:-1])


@BOTH
def test_b057_usage_comes_in_one_more_chunk(api: Api, path: str) -> None:
    stream = api.stream(path, stream_options={"include_usage": True})
    *others, last = stream.events
    assert all(event.get("usage") is None for event in others)
    assert all(event["choices"] for event in others)
    assert last["choices"] == []
    whole = api.ask(path)["usage"]
    for figure in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][figure] == whole[figure]


@BOTH
@pytest.mark.parametrize("options", [..., {}, {"include_usage": False}], ids=["absent", "empty", "false"])
def test_b058_no_usage_unless_asked_for(api: Api, path: str, options: Any) -> None:
    assert all(event.get("usage") is None for event in api.stream(path, stream_options=options).events)


@BOTH
def test_b059_continuous_usage_grows(api: Api, path: str) -> None:
    api.refuses(path, stream=True, stream_options={"continuous_usage_stats": True})
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = api.stream(path, stream_options=options, ignore_eos=True, max_tokens=8)
    counts = [event["usage"]["completion_tokens"] for event in stream.events]
    with_tokens = [count for event, count in zip(stream.events, counts, strict=True) if event["choices"] and count]
    assert with_tokens == sorted(set(with_tokens))
    assert counts[-1] == with_tokens[-1] == 8


@BOTH
def test_b060_choices_are_told_apart_by_index(api: Api, path: str) -> None:
    fields = {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 10, "ignore_eos": True}
    stream, whole = api.stream(path, **fields), api.ask(path, **fields)
    for index in range(3):
        assert stream.text(index) == whole_text(whole, index)


@BOTH
def test_b061_what_is_refused_is_no_stream(api: Api, path: str) -> None:
    for fields in ({"temperature": -1}, {"n": 0}, {"stop": ""}, {"max_tokens": 10**6}):
        error_of(api.post(path, api.body(path, stream=True, **fields)))
    error_of(api.post(path, api.body(path, stream=True, model="no-such-model")), (404,))
    api.still_serves()


def test_b062_a_failure_in_the_middle_is_told(api: Api, owned: Owned) -> None:
    for path in (CHAT, COMPLETIONS):
        with owned.failpoints("decode-0", "decode.step_n=raise:after(5):once"):
            stream = api.stream(path, max_tokens=40, ignore_eos=True)
        *before, last = stream.events
        assert len(before) > 2
        assert not any("error" in event for event in before)
        assert set(last["error"]) == {"message", "type", "param", "code"}
        api.still_serves()


def test_b063_a_client_that_leaves_frees_its_request(api: Api) -> None:
    """Many that leave at any moment, and then a short request is answered though the long ones would still run."""

    def leave(number: int) -> None:
        body = api.body(
            COMPLETIONS, prompt=f"{number} {STORY}", max_tokens=800, ignore_eos=True, stream=bool(number % 4)
        )
        try:
            with httpx.stream("POST", api.url + COMPLETIONS, json=body, headers=api.headers, timeout=60.0) as response:
                for count, _ in enumerate(response.iter_lines() if number % 4 else ()):
                    if count > number:
                        break
        except httpx.TransportError:
            pass

    def time_out(number: int) -> None:
        body = api.body(COMPLETIONS, prompt=f"{number} {STORY}", max_tokens=800, ignore_eos=True)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(api.url + COMPLETIONS, json=body, headers=api.headers, timeout=httpx.Timeout(60.0, read=0.02))

    targets = [leave if number % 2 and number % 4 else time_out for number in range(24)]
    threads = [threading.Thread(target=target, args=(number,)) for number, target in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    api.still_serves()
    names = ("baton_running_requests", "vllm:num_requests_running")

    def running() -> float:
        lines = api.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))

    eventually_sync(lambda: running() == 0, timeout_s=60.0, what="the end of what nobody waits for")


def test_b067_a_slow_reader_does_not_stall_others(api: Api) -> None:
    """One client asks for everything and reads nothing, while others are served."""
    address = urlsplit(api.url)
    body = json.dumps(
        api.body(
            CHAT,
            n=8,
            temperature=1,
            seed=1,
            max_tokens=600,
            ignore_eos=True,
            stream=True,
            logprobs=True,
            top_logprobs=20,
        )
    ).encode()
    headers = {
        "host": address.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
    } | api.headers
    head = f"POST {CHAT} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60.0)
        slow.connect((address.hostname, address.port or 80))
        slow.sendall(head.encode() + body)
        assert slow.recv(12) == b"HTTP/1.1 200"
        for number in range(3):
            stream = api.stream(COMPLETIONS, prompt=f"{number} {STORY}", max_tokens=20, ignore_eos=True)
            assert stream.finish_reason() == "length"
