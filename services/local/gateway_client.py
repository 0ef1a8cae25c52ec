"""A small client of a gateway's REST API, for the commands that run beside one."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from baton.services.runtime.settings import is_wildcard


class GatewayUnreachable(Exception):
    """Nobody answers there, or not in HTTP."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``body`` is the JSON that came, or None for anything else; ``text`` what came."""

    status: int
    body: Any
    text: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class StreamRefused(Exception):
    """An answer that is no stream."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        super().__init__(f"answered {answer.status}")


class GatewayClient:
    """One request, one connection. Blocking: call it in a thread where there is an event loop."""

    def __init__(self, host: str, port: int, *, api_key: str | None = None, timeout_s: float = 10.0) -> None:
        self._host = "localhost" if is_wildcard(host) else host
        self._port = port
        self._api_key = api_key
        self._timeout_s = timeout_s

    @staticmethod
    def from_url(url: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> GatewayClient:
        """Raises ValueError for what is not http://HOST[:PORT]."""
        split = urlsplit(url)
        if split.scheme != "http" or not split.hostname:
            raise ValueError(f"must look like http://host:8000, got {url!r}")
        return GatewayClient(split.hostname, split.port or 80, api_key=api_key, timeout_s=timeout_s)

    def get(self, path: str) -> Answer:
        return self._request("GET", path, None)

    def post(self, path: str, body: Any) -> Answer:
        return self._request("POST", path, body)

    def stream(self, path: str, body: Any) -> Iterator[str]:
        """The values of the answer's ``data:`` lines, as they come, without [DONE]. Closing it closes the connection.

        Raises StreamRefused for an answer that is no stream, GatewayUnreachable where it breaks.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", path, json.dumps(body), self._headers())
            response = connection.getresponse()
            if response.status != 200:
                raise StreamRefused(_answer(response, response.read()))
            is_done = False
            while line := response.readline():
                value = line.partition(b"data:")[2].strip().decode(errors="replace")
                is_done = is_done or value == "[DONE]"
                if value and not is_done:
                    yield value
            if not is_done:
                raise GatewayUnreachable(f"{self._host}:{self._port}: the stream was cut off")
        except (OSError, http.client.HTTPException) as error:
            raise GatewayUnreachable(f"{self._host}:{self._port}: {str(error) or type(error).__name__}") from None
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        key = {} if self._api_key is None else {"authorization": f"Bearer {self._api_key}"}
        return {"content-type": "application/json", **key}

    def _request(self, method: str, path: str, body: Any) -> Answer:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers())
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise GatewayUnreachable(f"{self._host}:{self._port}: {str(error) or type(error).__name__}") from None
        finally:
            connection.close()
        return _answer(response, content)


def _answer(response: http.client.HTTPResponse, content: bytes) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    return Answer(response.status, body, content.decode(errors="replace"), headers)
