"""A small client of a gateway's REST API, for the commands that run beside one."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from baton.services.runtime.settings import is_wildcard


class GatewayUnreachable(Exception):
    """Nobody answers there, or not in HTTP."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``body`` is the JSON that came, or None for anything else."""

    status: int
    body: Any


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

    def _request(self, method: str, path: str, body: Any) -> Answer:
        headers = {"content-type": "application/json"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise GatewayUnreachable(f"{self._host}:{self._port}: {str(error) or type(error).__name__}") from None
        finally:
            connection.close()
        try:
            return Answer(response.status, json.loads(content))
        except ValueError:
            return Answer(response.status, None)
