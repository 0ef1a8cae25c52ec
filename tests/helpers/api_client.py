"""A client of any OpenAI-compatible server, for tests that say what such a server has to do."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATIENCE_S = 60.0
ERROR_KEYS = {"message", "type", "param", "code"}
PROMPT = "The code for amber fox is 4821. What is the code for amber fox?"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": PROMPT}]
# What no public error may hold: addresses, paths, names of classes and libraries.
_INTERNALS = re.compile(r"0x[0-9a-f]{6,}|Traceback|\.py\b|pydantic|BaseModel|/home/|/usr/|site-packages")


@dataclass
class Stream:
    """A stream that was read to its end."""

    response: httpx.Response
    events: list[dict[str, Any]]
    comments: list[str]

    def choice_events(self, index: int = 0) -> list[dict[str, Any]]:
        """The parts of the events that belong to one choice."""
        return [choice for event in self.events for choice in event.get("choices", ()) if choice["index"] == index]

    def text(self, index: int = 0) -> str:
        """The joined content, or text, of a choice."""
        parts = self.choice_events(index)
        return "".join((part["delta"].get("content") if "delta" in part else part["text"]) or "" for part in parts)

    def finish_reason(self, index: int = 0) -> str | None:
        reasons = [part["finish_reason"] for part in self.choice_events(index) if part.get("finish_reason")]
        assert len(reasons) == 1, f"finish reasons of choice {index}: {reasons}"
        return str(reasons[0])


def read_events(response: httpx.Response) -> Stream:
    """Checks the form of a whole event stream: JSON events and comments, each ended by an empty line, then [DONE]."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-3:]
    comments = [block for block in blocks[:-2] if block.startswith(":")]
    data = [block for block in blocks[:-2] if not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in data), data
    return Stream(response, [json.loads(block.removeprefix("data: ")) for block in data], comments)


@dataclass
class Api:
    """A server and what is known about it."""

    url: str
    model: str
    key: str | None = None
    max_model_len: int | None = None
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=PATIENCE_S))

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.http.get(self.url + path, **({"headers": self.headers} | kwargs))

    def post(self, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str) -> httpx.Response:
        """``raw`` is sent as it is. Underscores in the names of ``headers`` stand for hyphens."""
        sent = {"content-type": "application/json"} | self.headers
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = json.dumps(body).encode() if raw is None else raw
        return self.http.post(self.url + path, content=content, headers=sent)

    def body(self, path: str, **fields: Any) -> dict[str, Any]:
        """A good greedy request for few tokens, changed by ``fields``; a field that is ... is left out."""
        prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
        body = {"model": self.model, **prompt, "max_tokens": 12, "temperature": 0} | fields
        return {name: value for name, value in body.items() if value is not ...}

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """The answer to a good request."""
        response = self.post(path, self.body(path, **fields))
        assert response.status_code == 200, response.text
        return dict(response.json())

    def chat(self, **fields: Any) -> dict[str, Any]:
        return self.ask(CHAT, **fields)

    def complete(self, **fields: Any) -> dict[str, Any]:
        return self.ask(COMPLETIONS, **fields)

    def stream(self, path: str, **fields: Any) -> Stream:
        """A good request, streamed and read to its end."""
        response = self.post(path, self.body(path, stream=True, **fields))
        assert response.status_code == 200, response.text
        return read_events(response)

    @contextmanager
    def open(self, path: str, **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """A stream whose events are read one by one; leaving the block hangs up."""
        body = self.body(path, stream=True, **fields)
        headers = self.headers | {"content-type": "application/json"}
        with (
            httpx.Client(timeout=PATIENCE_S) as http,  # a connection of its own: it is closed, not kept
            http.stream("POST", self.url + path, json=body, headers=headers) as response,
        ):
            assert response.status_code == 200, response.read()
            yield (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text. Skips the test where the server cannot tell."""
        response = self.post("/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        if response.status_code == 404:
            pytest.skip("the server has no /tokenize")
        assert response.status_code == 200, response.text
        return list(response.json()["tokens"])

    def without_space(self) -> dict[str, float]:
        """A logit bias against white space, which small models like to fill JSON with."""
        return {str(token): -100.0 for text in (" ", "  ", "\n", "\t", "\r") for token in self.tokenize(text)}

    def context_length(self) -> int:
        if self.max_model_len is None:
            pytest.skip("the server does not tell its context length (max_model_len in /v1/models)")
        return self.max_model_len

    def refuses(self, path: str, *, status: tuple[int, ...] = (400,), param: str | None = None, **fields: Any) -> str:
        """A request with these fields is refused as it should be, and a good one behind it is served. Returns the message."""
        error = error_of(self.post(path, self.body(path, **fields)), status)
        if param is not None:
            named = str(error["param"])
            assert named == param or named.startswith((f"{param}.", f"{param}[")), error
        self.still_serves()
        return str(error["message"])

    def still_serves(self) -> None:
        answer = self.complete(max_tokens=1)
        assert answer["usage"]["completion_tokens"] == 1

    def at_once(self, path: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
        """The responses to all bodies, sent at the same time."""
        responses: dict[int, httpx.Response] = {}

        def ask(number: int) -> None:
            responses[number] = self.post(path, bodies[number])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [responses[number] for number in range(len(bodies))]


def error_of(response: httpx.Response, status: tuple[int, ...] = (400,)) -> dict[str, Any]:
    """The error object of a response, after checking what holds for all of them. ``code`` may be text, number or null."""
    assert response.status_code in status, f"{response.status_code}: {response.text[:500]}"
    assert response.headers["content-type"].startswith("application/json")
    error = dict(response.json()["error"])
    assert set(error) >= ERROR_KEYS, error
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str | int)
    assert len(response.text) < 4000
    assert not _INTERNALS.search(response.text), response.text
    return error
