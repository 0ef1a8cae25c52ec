"""The bodies of Anthropic's Messages API: field names and types."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from baton.services.gateway.openai_models import Body, SloBody


class CountTokensBody(Body):
    """POST /v1/messages/count_tokens."""

    required: ClassVar[tuple[str, ...]] = ("messages",)

    model: str | None = Field(None, description="Default: the model that is served.")
    messages: list[dict[str, Any]] = Field(description="Turns of user and assistant; content is text or blocks.")
    system: Any = Field(None, description="Text, or text blocks.")
    tools: list[dict[str, Any]] | None = Field(None, description="name, description, input_schema.")
    tool_choice: dict[str, Any] | None = Field(None, description='{"type": "auto" | "any" | "tool" | "none"}.')
    thinking: dict[str, Any] | None = Field(None, description='{"type": "enabled" | "disabled" | "adaptive"}.')


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    required = ("messages", "max_tokens")

    max_tokens: int = Field(description="Most tokens to generate.")
    stop_sequences: list[str] | None = Field(None, description="Strings that end the answer.")
    stream: bool | None = Field(None, description="Server-sent events.")
    temperature: float | None = Field(None, description="0 to 2; 0 is greedy.")
    top_p: float | None = Field(None, description="Above 0 to 1.")
    top_k: int | None = Field(None, description="-1 and 0 are off.")
    output_config: dict[str, Any] | None = Field(None, description='{"format": {"type": "json_schema", "schema"}}.')
    logit_bias: dict[str, float] | None = Field(None, description="Token id to bias.")
    seed: int | None = Field(None, description="Equal seeds give equal answers.")
    min_tokens: int | None = Field(None, description="No end before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on behind the end-of-sequence token.")
    cache_salt: str | None = Field(None, description="Requests with different salts share no cache.")
    session_id: str | None = Field(None, description="Names the conversation, whose blocks are kept between turns.")
    session_ttl_s: float | None = Field(None, description="Seconds that they are kept after this turn.")
    cache_control: dict[str, Any] | None = Field(
        None, description='{"type": "ephemeral", "ttl": "5m" | "1h"}: the same.'
    )
    slo: SloBody | None = None
