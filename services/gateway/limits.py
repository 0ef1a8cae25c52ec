"""What one client, one request and all requests together may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.services.core.errors import BatonError, ErrorCode


@dataclass(frozen=True, slots=True)
class Limits:
    """Checked before work is done. Prompt and output are limited by the model's context length besides."""

    max_concurrent_requests: int = 1024
    max_body_bytes: int = 16 * 1024 * 1024
    body_timeout_s: float = 30.0  # from the request's headers to the end of its body
    max_header_bytes: int = 32 * 1024
    max_headers: int = 100
    max_messages: int = 10_000
    max_n: int = 8
    max_choices: int = 128  # prompts x n
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 128
    max_logit_biases: int = 1024
    max_logprobs: int = 20
    max_grammar_bytes: int = 256 * 1024  # of one schema, expression or grammar
    max_schema_depth: int = 100
    max_tools: int = 128
    request_timeout_s: float | None = 600.0
    # To the first token of a request that asks for nothing in time; what would take longer is refused.
    patience_s: float = 60.0
    keepalive_s: float = 15.0  # a waiting stream gets a comment after so long, so that proxies keep it open


class Door:
    """Counts the generations that are under way and refuses what is too many, before any work is done for it."""

    def __init__(self, max_concurrent_requests: int) -> None:
        self._max = max_concurrent_requests
        self._num_inside = 0
        self._is_closed = False

    @property
    def num_inside(self) -> int:
        return self._num_inside

    def close(self) -> None:
        """Lets nobody in any more: the process drains."""
        self._is_closed = True

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Held while a generation runs. Raises OVERLOADED or DRAINING."""
        if self._is_closed:
            raise BatonError(ErrorCode.DRAINING, "the gateway is draining")
        if self._num_inside >= self._max:
            raise BatonError(ErrorCode.OVERLOADED, f"{self._max} requests are under way", retry_after_s=1.0)
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1
