"""The body of OpenAI's Responses API: field names and types."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from baton.services.gateway.openai_models import Body, SloBody


class ResponsesBody(Body):
    """POST /v1/responses."""

    required = ("input",)
    accepted = frozenset({"reasoning"})
    # Of a server that keeps responses, or runs tools, or picks what to forget.
    refused = frozenset(
        {"previous_response_id", "conversation", "prompt", "top_logprobs", "max_tool_calls", "moderation"}
    )

    model: str | None = Field(None, description="Default: the model that is served.")
    input: Any = Field(description="Text, or a list of items: messages, function calls and their outputs.")
    instructions: str | None = Field(None, description="A system prompt before the input.")
    stream: bool | None = Field(None, description="Server-sent events.")
    max_output_tokens: int | None = Field(None, description="Most tokens to generate.")
    temperature: float | None = Field(None, description="0 to 2; 0 is greedy.")
    top_p: float | None = Field(None, description="Above 0 to 1.")
    tools: list[dict[str, Any]] | None = Field(None, description="Functions that the model may call.")
    tool_choice: Any = Field(None, description='"auto", "none", "required", or {"type": "function", "name"}.')
    parallel_tool_calls: bool | None = Field(None, description="Default true.")
    text: dict[str, Any] | None = Field(
        None, description='{"format": {"type": "text" | "json_object" | "json_schema"}}.'
    )
    reasoning: dict[str, Any] | None = Field(None, description="effort none or minimal: no thoughts.")
    truncation: str | None = Field(None, description='"disabled" only.')
    background: bool | None = Field(None, description="false only.")
    store: bool | None = Field(None, description="Has no effect: responses are not kept.")
    include: list[str] | None = Field(None, description="Only what asks for nothing of this server.")
    metadata: dict[str, Any] | None = Field(None, description="Given back.")
    user: str | None = Field(None, description="Given back.")
    # Extras, as in the other APIs.
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Any = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    session_ttl_s: float | None = None
    prompt_cache_retention: str | None = None
    priority: int | None = None
    slo: SloBody | None = None
