"""A completion as its client reads it."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import httpx
from helpers.serving import Serving
from helpers.waiting import eventually_sync

PATIENCE_S = 90.0


@dataclass
class Stream:
    """A client's stream, read on a thread of its own."""

    server: Serving
    body: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    request_id: str = ""

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream(
                "POST", f"{self.server.url}/v1/completions", json=self.body, timeout=PATIENCE_S
            ) as response:
                if response.status_code != 200:
                    self.problem = f"{response.status_code}: {response.read().decode()}"
                    return
                self.request_id = response.headers["x-request-id"]
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.problem = repr(error)

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.problem = str(event["error"])
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            self.tokens += choice.get("token_ids") or ()
            self.text += choice["text"]
            self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", ())
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    def wait_for(self, num_tokens: int) -> None:
        eventually_sync(
            lambda: len(self.tokens) >= num_tokens or self.problem, timeout_s=PATIENCE_S, what=f"token {num_tokens}"
        )
        assert self.problem is None

    def finish(self) -> Stream:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"{len(self.tokens)} tokens and no end"
        assert self.problem is None, self.problem
        return self

    @property
    def receipt(self) -> dict[str, Any]:
        return dict(self.server.get(f"/v1/requests/{self.request_id}").json())
