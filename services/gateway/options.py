"""A generation request after validation, the same for every API that it may come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from baton.services.core.request import SamplingParams
from baton.services.core.tenants import Tenant
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.grammar import Grammar
from baton.services.gateway.reading import Reading
from baton.services.gateway.tokenizer import ChatOptions


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, taken as they are."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation to answer: plain messages, as the chat template reads them."""

    messages: list[Mapping[str, Any]]
    options: ChatOptions = field(default_factory=ChatOptions)


Prompt: TypeAlias = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What to generate. Ranges were checked; what depends on the prompt's length is checked when it is known.

    ``sampling`` is complete but for ``max_tokens`` and ``seed``, which differ between choices.
    """

    model: str  # the name that the client used
    prompts: tuple[Prompt, ...]
    prompt_param: str  # "messages" or "prompt": what to blame for a long prompt
    sampling: SamplingParams
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    default_max_tokens: int | None = None  # None: what the context length leaves
    n: int = 1
    seed: int | None = None  # signed 64 bit; None: random
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    prompt_logprobs: bool = False  # show them in their own field
    return_token_ids: bool = False
    grammar: Grammar | None = None  # what each answer must match; not yet tried out
    reading: Reading = field(default_factory=Reading)  # what else than content a choice may hold
    cache_salt: str | None = None
    session_id: str | None = None  # the client's name of the conversation; None: its header's, if there is one
    session_ttl_s: float = 300.0
    priority: int = 0  # among the tenant's own that wait: the lowest first
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def shows_tokens(self) -> bool:
        """Tokens are told of one by one, or have to be told apart: those of thoughts are counted."""
        return self.return_token_ids or self.sampling.num_logprobs is not None or self.reading.markers is not None

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and how the request is known. ``timeout_s`` counts from now."""

    receipt_id: str
    tenant: Tenant
    received_s: float
    slo: SloTarget
    timeout_s: float | None
    session_id: str | None = None  # of its header
