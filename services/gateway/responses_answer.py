"""POST /v1/responses, on its way out: a response object, or the numbered events that lead to it."""

from __future__ import annotations

from typing import Any

import orjson

from baton.services.gateway.choice import ChoicePiece
from baton.services.gateway.collect import CollectedChoice
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.errors import public_error
from baton.services.gateway.pipeline import Generation
from baton.services.gateway.rendering import Answer
from baton.services.gateway.responses_items import Event, Items
from baton.services.gateway.responses_models import ResponsesBody
from baton.services.gateway.sse import Form
from baton.services.gateway.tools.calls import Text
from baton.services.gateway.translation import parts_of


class ResponsesAnswer(Answer):
    """Renders one generation as a response."""

    id_prefix = "resp_"
    object_name = "response"

    def __init__(self, generation: Generation, deps: GatewayDeps, receipt_id: str, body: ResponsesBody) -> None:
        super().__init__(generation, deps, receipt_id)
        self._body = body
        self._items = Items()
        self._num_events = 0
        self._has_begun = False
        self._finish_reason: str | None = None

    @property
    def form(self) -> Form:
        return Form(self._failure, end=b"")

    def whole(self, choices: list[CollectedChoice]) -> bytes:
        """The JSON body of an answer that is not streamed."""
        choice = choices[0]
        self._items.feed([Text(choice.text)] if choice.parts is None else choice.parts)
        return orjson.dumps(self._finished(choice.finish_reason)[1])

    def render(self, piece: ChoicePiece) -> bytes:
        events: list[Event] = []
        if not self._has_begun:
            self._has_begun = True
            response = self._response("in_progress")
            events.append({"type": "response.created", "response": response})
            events.append({"type": "response.in_progress", "response": response})
        events += self._items.feed(parts_of(piece))
        self._finish_reason = piece.finish_reason or self._finish_reason
        return b"".join(map(self._event, events))

    def ending(self) -> bytes:
        events, response = self._finished(self._finish_reason)
        events.append({"type": f"response.{response['status']}", "response": response})
        return b"".join(map(self._event, events))

    def _finished(self, finish_reason: str | None) -> tuple[list[Event], dict[str, Any]]:
        is_cut = finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        events = self._items.close(status)
        response = self._response(status) | {"output": self._items.output, "usage": self._tokens()}
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return events, response

    def _failure(self, error: BaseException) -> bytes:
        """A failure in a stream ends the response."""
        public = public_error(error)
        events = self._items.close("incomplete")
        response = self._response("failed") | {"output": self._items.output}
        response["error"] = {"code": public.code, "message": public.message}
        return b"".join(map(self._event, [*events, {"type": "response.failed", "response": response}]))

    def _event(self, event: Event) -> bytes:
        numbered = event | {"sequence_number": self._num_events}
        self._num_events += 1
        return b"event: " + str(event["type"]).encode() + b"\ndata: " + orjson.dumps(numbered) + b"\n\n"

    def _response(self, status: str) -> dict[str, Any]:
        body, options = self._body, self.generation.options
        text = body.text or {}
        reasoning = body.reasoning or {}
        return {
            "id": self._id,
            "object": self.object_name,
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": options.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.get("effort"), "summary": None},
            "store": False,
            "temperature": options.sampling.temperature,
            "text": {"format": text.get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": options.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _tokens(self) -> dict[str, Any]:
        usage = self.generation.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
