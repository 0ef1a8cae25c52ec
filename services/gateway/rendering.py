"""What the answers of chat and completions have in common, and how a chunk of mere text is made cheaply."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from baton.services.gateway.choice import ChoicePiece, OutputToken
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.outlet import Outlet
from baton.services.gateway.pipeline import Generation
from baton.services.gateway.shortcut import Rendered
from baton.services.gateway.sse import OPENAI, Form


class ChunkText:
    """A chunk rendered once, with a hole for its text: a stream's chunks differ in nothing else.

    ``chunk`` must have ``field`` exactly once, as its own key, with an empty string as value.
    """

    def __init__(self, chunk: dict[str, Any], field: bytes) -> None:
        # Looked for from the right: what the client named (ids, the model) stands on the left.
        head, _, tail = orjson.dumps(chunk).rpartition(field + b'""')
        self._head = b"data: " + head + field
        self._tail = tail + b"\n\n"

    def render(self, text: str) -> bytes:
        """The event for ``text``."""
        return self._head + orjson.dumps(text) + self._tail

    def render_each(self, texts: Sequence[str]) -> bytes:
        """An event for each text that is not empty: tokens that came together are told apart all the same."""
        if len(texts) == 1:
            return self.render(texts[0]) if texts[0] else b""
        return b"".join([self._head + orjson.dumps(text) + self._tail for text in texts if text])


class Answer:
    """One generation's identity, as every chunk and body of it carries it."""

    id_prefix = ""
    object_name = ""

    def __init__(self, generation: Generation, deps: GatewayDeps, receipt_id: str) -> None:
        self.generation = generation
        self.deps = deps
        self._id = self.id_prefix + receipt_id
        self._created = int(deps.wall_clock())
        self._num_streamed = 0
        options = generation.options
        # Nothing is told of a token but its text.
        self._is_plain = not (
            options.sampling.num_logprobs is not None or options.return_token_ids or options.continuous_usage
        )

    @property
    def form(self) -> Form:
        """How a stream of it fails and ends."""
        return OPENAI

    async def chunks(self, outlet: Outlet | None = None) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer, but for what its form ends it with. Failures are raised.

        With an ``outlet`` what need not be waited for may leave through it, and not come here.
        """
        shortcut = None if outlet is None else Rendered(self.render, outlet)
        async with aclosing(self.generation.stream(shortcut)) as pieces:
            async for piece in pieces:
                if chunk := self.render(piece):
                    yield chunk
        if ending := self.ending():
            yield ending

    def render(self, piece: ChoicePiece) -> bytes:
        """The events that a piece makes, if it makes any. To be called with one piece after another."""
        raise NotImplementedError

    def ending(self) -> bytes:
        """The events behind the last piece, if there are any."""
        return b""

    def envelope(self, object_name: str) -> dict[str, Any]:
        """The fields that come first."""
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self.generation.options.model,
        }

    def usage(self) -> dict[str, Any]:
        """The usage of the whole generation."""
        usage = self._usage(self.generation.usage.completion_tokens)
        if self.generation.options.reading.markers is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.generation.usage.reasoning_tokens}
        return usage

    def _usage(self, completion_tokens: int) -> dict[str, Any]:
        usage = self.generation.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": usage.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }

    def chunk_usage(self, num_new_tokens: int = 0) -> dict[str, Any]:
        """A chunk's ``usage``: absent unless asked for, null but in the last chunk, or what has been streamed so far."""
        options = self.generation.options
        if not options.include_usage:
            return {}
        self._num_streamed += num_new_tokens
        return {"usage": self._usage(self._num_streamed) if options.continuous_usage else None}

    def token_ids(self, index: int, tokens: Sequence[OutputToken], *, with_prompt: bool) -> dict[str, Any]:
        """A choice's ids, if the client asked for them."""
        if not self.generation.options.return_token_ids:
            return {}
        ids: dict[str, Any] = {"token_ids": [token.sampled.token_id for token in tokens]}
        return {"prompt_token_ids": self.generation.prompt_of(index)} | ids if with_prompt else ids
