"""The bodies that clients send: field names and types. Ranges and meaning are checked in validation.py.

Types are strict ("10" is no integer). Fields that are not listed are accepted and ignored, but for those in ``REFUSED``,
which would change the answer. Fields that may have several shapes are Any here and are checked by hand.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    # Null is the same as absent, except for these.
    required: ClassVar[tuple[str, ...]] = ()
    # Of other APIs than this one, and they would change the answer.
    refused: ClassVar[frozenset[str]] = frozenset()
    # Of what is refused elsewhere, what this API has.
    accepted: ClassVar[frozenset[str]] = frozenset()


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(None, description="A last chunk with the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Usage so far in every chunk; with include_usage.")


class SloBody(Body):
    """Targets of one request."""

    class_: str | None = Field(None, alias="class", description="interactive, standard or batch.")
    ttft_ms: float | None = Field(None, description="Time to first token in ms.")
    tpot_ms: float | None = Field(None, description="Time per output token in ms.")


class GenerationBody(Body):
    """What chat and completion requests share."""

    model: str | None = Field(None, description="Default: the model that is served.")
    max_tokens: int | None = Field(None, description="Most tokens to generate.")
    temperature: float | None = Field(None, description="0 to 2; 0 is greedy.")
    top_p: float | None = Field(None, description="Above 0 to 1.")
    top_k: int | None = Field(None, description="-1 and 0 are off.")
    min_p: float | None = Field(None, description="0 to 1.")
    presence_penalty: float | None = Field(None, description="-2 to 2.")
    frequency_penalty: float | None = Field(None, description="-2 to 2.")
    repetition_penalty: float | None = Field(None, description="Above 0; 1 is off.")
    logit_bias: dict[str, float] | None = Field(None, description="Token id to bias, clamped to -100..100.")
    seed: int | None = Field(None, description="Equal seeds give equal answers. -1: random.")
    n: int | None = Field(None, description="Choices per prompt.")
    stop: Any = Field(None, description="A string, or a list of strings, that ends the generation.")
    stop_token_ids: list[int] | None = Field(None, description="Token ids that end the generation.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the text.")
    ignore_eos: bool | None = Field(None, description="Go on behind the end-of-sequence token.")
    min_tokens: int | None = Field(None, description="No end before so many tokens.")
    prompt_logprobs: int | None = Field(None, description="Alternatives to report per prompt token; not in streams.")
    skip_special_tokens: bool | None = Field(None, description="Default true.")
    return_token_ids: bool | None = Field(None, description="Add token_ids and prompt_token_ids to each choice.")
    stream: bool | None = Field(None, description="Server-sent events.")
    stream_options: StreamOptions | None = None
    slo: SloBody | None = None
    cache_salt: str | None = Field(
        None, description="1 to 1024 characters; requests with different salts share no cache."
    )
    session_id: str | None = Field(
        None, description="Names the conversation, whose blocks are kept between turns. 1 to 128 characters."
    )
    session_ttl_s: float | None = Field(
        None, description="Seconds that they are kept after this turn. Above 0 to 86400."
    )
    prompt_cache_retention: str | None = Field(
        None, description="The same in OpenAI's words: in_memory (300 s) or 24h; needs a session id."
    )
    priority: int | None = Field(
        None, description="Among your own requests of the same class that wait: the lowest first. Default: 0."
    )
    add_special_tokens: bool | None = Field(None, description="Default: true for text, false behind a chat template.")
    response_format: dict[str, Any] | None = Field(
        None, description='{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {...}}.'
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="One of json (a schema), regex, choice, grammar (Lark or llguidance), json_object."
    )


class ChatCompletionBody(GenerationBody):
    """POST /v1/chat/completions."""

    required = ("messages",)

    messages: list[dict[str, Any]] = Field(description="The conversation, at least one message.")
    max_completion_tokens: int | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = Field(None, description="Report the logprob of each token.")
    top_logprobs: int | None = Field(None, description="Alternatives to report per token, 0 to 20.")
    add_generation_prompt: bool | None = Field(None, description="Default true.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message instead.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="enable_thinking, thinking: booleans.")
    tools: Any = Field(None, description="Functions that the model may call.")
    tool_choice: Any = Field(None, description='"auto", "none", "required", or the function that must be called.')
    parallel_tool_calls: bool | None = Field(None, description="Default true; false: one call at most.")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    required = ("prompt",)
    refused = frozenset({"tools", "tool_choice", "parallel_tool_calls"})

    prompt: Any = Field(description="A string, a list of token ids, or a list of either.")
    logprobs: int | None = Field(None, description="Alternatives to report per token, 0 to 20.")
    echo: bool | None = Field(None, description="Put the prompt before the text, and its logprobs if asked for.")
    best_of: int | None = Field(None, description="Only the value of n.")


class TokenizeBody(Body):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = Field(None, description="Add each token as text.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    required = ("tokens",)

    model: str | None = None
    tokens: list[int]


# Fields of other servers, or of later versions of this one, that would change the answer: refused, never ignored.
REFUSED = frozenset(
    {
        *("functions", "function_call"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar"),
        *("reasoning", "reasoning_effort", "include_reasoning", "thinking_token_budget"),
        *("modalities", "audio", "prediction", "web_search_options", "prompt_embeds", "mm_processor_kwargs"),
        *("chat_template", "documents", "suffix", "use_beam_search", "length_penalty", "truncate_prompt_tokens"),
        *("allowed_token_ids", "bad_words", "logprob_token_ids", "repetition_detection"),
        *("kv_transfer_params", "ec_transfer_params", "vllm_xargs"),
    }
)
