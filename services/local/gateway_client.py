"""A small client of a gateway's REST API, for the commands that run beside one."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from baton.services.runtime.client_tls import advice, client_context
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

    def __init__(
        self,
        host: str,
        port: int,
        *,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        """``tls`` is asked with each connection; None: plain HTTP."""
        self._tls = tls
        self._host = "localhost" if is_wildcard(host) else host
        self._port = port
        self._api_key = api_key
        self._timeout_s = timeout_s

    @staticmethod
    def from_url(url: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> GatewayClient:
        """Raises ValueError for what is not http://HOST[:PORT] or https://HOST[:PORT]."""
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ValueError(f"must look like http://host:8000 or https://host:8000, got {url!r}")
        if split.scheme == "http":
            return GatewayClient(split.hostname, split.port or 80, api_key=api_key, timeout_s=timeout_s)
        context = client_context()
        return GatewayClient(
            split.hostname, split.port or 443, api_key=api_key, timeout_s=timeout_s, tls=lambda: context
        )

    def get(self, path: str) -> Answer:
        return self._request("GET", path, None)

    def post(self, path: str, body: Any) -> Answer:
        return self._request("POST", path, body)

    def stream(self, path: str, body: Any) -> Iterator[str]:
        """The values of the answer's ``data:`` lines, as they come, without [DONE]. Closing it closes the connection.

        Raises StreamRefused for an answer that is no stream, GatewayUnreachable where it breaks.
        """
        connection = self._connect()
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
            raise GatewayUnreachable(self._why(error)) from None
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls())

    def _why(self, error: Exception) -> str:
        """With what to do about it, where TLS may be the cause."""
        hint = ""
        if isinstance(error, ssl.SSLError):
            hint = f"; {advice(error)}"
        elif self._tls is None and isinstance(error, (ConnectionResetError, http.client.BadStatusLine)):
            hint = "; if it speaks TLS, its URL begins with https://"
        return f"{self._host}:{self._port}: {str(error) or type(error).__name__}{hint}"

    def _headers(self) -> dict[str, str]:
        key = {} if self._api_key is None else {"authorization": f"Bearer {self._api_key}"}
        return {"content-type": "application/json", **key}

    def _request(self, method: str, path: str, body: Any) -> Answer:
        connection = self._connect()
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers())
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise GatewayUnreachable(self._why(error)) from None
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
