"""From GenerationOptions to pieces of text: the one path that REST and gRPC share."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.lifecycle import Instant, Trace
from baton.services.core.request import FinishReason, SamplingParams, TokenLogprobs
from baton.services.core.tenants import Tenant
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.admission import Ticket
from baton.services.gateway.auth import tenant_salt
from baton.services.gateway.choice import ChoiceAssembler, ChoicePiece
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.fan_out import merge
from baton.services.gateway.generation import GenerationRequest
from baton.services.gateway.options import Caller, ChatPrompt, GenerationOptions, Prompt, TextPrompt
from baton.services.gateway.reading import TOOL_CALLS, ChoiceReader
from baton.services.gateway.required_output import TAIL_TOKENS, is_thinking, required_output
from baton.services.gateway.sessions import session_tag
from baton.services.gateway.shortcut import Rendered, Shortcut
from baton.services.gateway.validation import invalid
from baton.services.runtime.token_columns import TokenRow

_MASK = 2**64 - 1


@dataclass(slots=True)
class Usage:
    """Tokens so far. Each prompt counts once, however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion tokens


@dataclass(slots=True)
class _Choice:
    index: int
    request: GenerationRequest
    is_leader: bool  # the first choice of its prompt
    runs: bool  # false: the echoed prompt is the whole answer
    drops_output: bool  # it runs for the prompt's logprobs only


class Generation:
    """A request whose prompts are tokens. ``stream`` runs it; closing that stream cancels everything."""

    def __init__(
        self,
        deps: GatewayDeps,
        options: GenerationOptions,
        tenant: Tenant,
        prompts: list[list[int]],
        choices: list[_Choice],
        ticket: Ticket | None = None,
        *,
        is_thinking: bool = False,
    ):
        """``is_thinking``: the prompt has opened the model's thoughts."""
        self.options = options
        self._is_thinking = is_thinking
        self.prompt_token_ids = prompts
        self.usage = Usage(prompt_tokens=sum(map(len, prompts)))
        self._deps = deps
        self._tenant = tenant
        self._choices = choices
        self._ticket = ticket
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...] | None] = {}

    def prompt_of(self, index: int) -> list[int]:
        """Token ids of the prompt of a choice."""
        return self.prompt_token_ids[index // self.options.n]

    def stream(self, rendered: Rendered | None = None) -> AsyncGenerator[ChoicePiece, None]:
        """Pieces of all choices as they are made. Failures are raised as BatonError.

        What can be ``rendered`` and sent while the reader of these pieces waits does not come here.
        """
        if len(self._choices) == 1:
            return self._run(self._choices[0], rendered)
        sources = [self._run(choice) for choice in self._choices]  # read by somebody else, so they take turns
        n = self.options.n
        return merge([sources[start : start + n] for start in range(0, len(sources), n)])

    async def _run(self, choice: _Choice, rendered: Rendered | None = None) -> AsyncGenerator[ChoicePiece, None]:
        assembler = self._assembler(choice)
        if not choice.runs:
            yield self._complete(choice, assembler.feed(TokenDelta(0, (), FinishReason.LENGTH)))
            return
        reader = None if self.options.reading.is_plain else self.options.reading.reader(is_open=self._is_thinking)
        if rendered is not None and not self.options.stop and not choice.drops_output:
            middle = partial(self._middle, choice, assembler, reader)
            choice.request.shortcut = Shortcut(middle, rendered)
        last: ChoicePiece | None = None
        cached_tokens = 0
        async with aclosing(self._deps.dispatcher.generate(choice.request)) as deltas:
            async for delta in deltas:
                kept = _without_tokens(delta) if choice.drops_output else delta
                piece = self._complete(choice, assembler.feed(kept))
                self._used(piece.num_tokens)
                is_cut = piece.finish_reason is not None and delta.finish_reason is None
                if reader is not None:
                    piece = self._read(reader, choice, piece)
                if choice.is_leader and delta.cached_tokens is not None:
                    self.usage.cached_tokens += delta.cached_tokens - cached_tokens
                    cached_tokens = delta.cached_tokens
                if piece.finish_reason is None:
                    yield piece
                    continue
                if is_cut:  # by a stop string: the cancellation that follows is no abort
                    self._deps.dispatcher.finish(choice.request, piece.finish_reason, assembler.num_tokens)
                last = piece
                break
        choice.request.shortcut = None
        if last is None:
            raise BatonError(ErrorCode.INTERNAL, "a generation ended without a finish reason")
        yield last  # when everything is released

    def _middle(
        self, choice: _Choice, assembler: ChoiceAssembler, reader: ChoiceReader | None, row: TokenRow
    ) -> ChoicePiece:
        """The piece of tokens that end nothing."""
        piece = assembler.feed_row(row.first_index, row.token_ids)
        self._used(piece.num_tokens)
        return piece if reader is None else self._read(reader, choice, piece)

    def _read(self, reader: ChoiceReader, choice: _Choice, piece: ChoicePiece) -> ChoicePiece:
        """The piece with its parts."""
        self.usage.reasoning_tokens -= reader.num_reasoning_tokens
        piece = reader.feed(piece)
        self.usage.reasoning_tokens += reader.num_reasoning_tokens
        if reader.num_calls:
            choice.request.stop_means = TOOL_CALLS
        return piece

    def _used(self, num_tokens: int) -> None:
        self.usage.completion_tokens += num_tokens
        if self._ticket is not None:
            self._ticket.on_tokens(num_tokens)
        self._deps.tenants.charge(self._tenant, num_tokens, self._deps.wall_clock())

    def _complete(self, choice: _Choice, piece: ChoicePiece) -> ChoicePiece:
        """Gives the other choices of a prompt the logprobs of the prompt, which the first one has computed."""
        if not piece.is_first:
            return piece
        prompt_index = choice.index // self.options.n
        if choice.is_leader:
            self._prompt_logprobs[prompt_index] = piece.prompt_logprobs
            return piece
        return piece._replace(prompt_logprobs=self._prompt_logprobs.get(prompt_index))

    def _assembler(self, choice: _Choice) -> ChoiceAssembler:
        options, sampling = self.options, choice.request.sampling
        detokenizer = self._deps.tokenizer.detokenizer(
            choice.request.prompt_token_ids,
            skip_special_tokens=options.skip_special_tokens,
            keep_prompt_text=options.echo,
            shown_ids=self._deps.tokenizer.special_ids_of(options.reading.shown),
        )
        hides_ends = options.skip_special_tokens and not sampling.ignore_eos
        return ChoiceAssembler(
            choice.index,
            detokenizer,
            stop=options.stop,
            include_stop=options.include_stop,
            min_tokens=sampling.min_tokens,
            hidden_end_ids=sampling.eos_token_ids if hides_ends else frozenset(),
            shows_tokens=options.shows_tokens,
        )


async def prepare(deps: GatewayDeps, options: GenerationOptions, caller: Caller) -> Generation:
    """Tokenises the prompts and checks that each fits. Raises BatonError; nothing has been dispatched then."""
    trace = Trace()
    trace.mark(Instant.RECEIVED, caller.received_s)
    ticket = await deps.admission.enter(options, caller)
    trace.mark(Instant.ADMITTED, deps.clock())
    prompts = [await tokenize(deps, prompt, options.prompt_param) for prompt in options.prompts]
    limits = [_max_tokens(deps, options, len(prompt)) for prompt in prompts]
    tail = deps.tokenizer.tail(prompts[0], TAIL_TOKENS) if options.reading.markers else ""
    thinking = is_thinking(options.reading.markers, tail)
    required = required_output(options, deps.tokenizer, deps.limits, thinking)
    grammar = None if required is None else await deps.grammars.check(required)
    trace.mark(Instant.TOKENIZED, deps.clock())
    base_id = f"{caller.receipt_id[:64]}.{secrets.token_hex(8)}"
    seed = secrets.randbits(64) if options.seed is None else options.seed & _MASK
    choices = []
    for index in range(options.num_choices):
        prompt_index, number = divmod(index, options.n)
        request = GenerationRequest(
            request_id=f"{base_id}.{index}",
            receipt_id=caller.receipt_id,
            model=deps.model.name,
            prompt_token_ids=prompts[prompt_index],
            sampling=_sampling(
                options, limits[prompt_index], choice_seed(seed, number), grammar, is_leader=number == 0
            ),
            cache_salt=tenant_salt(caller.tenant, options.cache_salt),
            slo=caller.slo,
            tenant=caller.tenant,
            priority=options.priority,
            session=session_tag(options, caller),
            timeout_s=caller.timeout_s,
            trace=Trace(dict(trace.instants)),
        )
        is_empty = limits[prompt_index] == 0
        needs_run = not is_empty or (number == 0 and request.sampling.num_prompt_logprobs is not None)
        choices.append(_Choice(index, request, number == 0, needs_run, drops_output=is_empty))
    deps.tenants.charge(caller.tenant, sum(map(len, prompts)), deps.wall_clock())
    deps.admission.learn(options.prompts, sum(map(len, prompts)))
    return Generation(deps, options, caller.tenant, prompts, choices, ticket, is_thinking=bool(thinking))


def _without_tokens(delta: TokenDelta) -> TokenDelta:
    return TokenDelta(0, (), FinishReason.LENGTH, None, delta.cached_tokens, delta.prompt_logprobs)


def choice_seed(seed: int, number: int) -> int:
    """The seed of the ``number``-th choice of a prompt: its own stream of draws, the first one's being ``seed`` itself.

    The mixing is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    if number == 0:
        return seed
    mixed = (seed + number * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def _sampling(
    options: GenerationOptions, max_tokens: int, seed: int, grammar: str | None, *, is_leader: bool
) -> SamplingParams:
    # The prompt's logprobs are the same for all of its choices, and cost the prefix cache: one choice computes them.
    num_prompt_logprobs = options.sampling.num_prompt_logprobs if is_leader else None
    return dataclasses.replace(
        options.sampling,
        max_tokens=max(1, max_tokens),
        seed=seed,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=grammar,
    )


async def tokenize(deps: GatewayDeps, prompt: Prompt, param: str) -> list[int]:
    """Token ids of a prompt. Raises BatonError where it is empty or too long."""
    max_model_len = deps.model.max_model_len
    if isinstance(prompt, ChatPrompt):
        token_ids = await deps.tokenizer.encode_chat(prompt.messages, prompt.options, max_tokens=max_model_len)
    elif isinstance(prompt, TextPrompt):
        token_ids = await deps.tokenizer.encode(
            prompt.text, add_special_tokens=prompt.add_special_tokens, max_tokens=max_model_len, param=param
        )
    else:
        token_ids = prompt.token_ids
    if not token_ids:
        raise invalid(param, "is empty: there is no token to continue")
    return token_ids


def _max_tokens(deps: GatewayDeps, options: GenerationOptions, num_prompt_tokens: int) -> int:
    """How much a choice may generate. Raises CONTEXT_LENGTH_EXCEEDED with the limit and the figures."""
    limit = deps.model.max_model_len
    left = limit - num_prompt_tokens
    asked = options.max_tokens
    # Computing the prompt's logprobs alone takes a step that samples one token.
    least = 1 if asked != 0 or options.sampling.num_prompt_logprobs is not None else 0
    if left < least:
        raise BatonError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"This model's maximum context length is {limit} tokens. However, your prompt is {num_prompt_tokens} tokens "
            "long, which leaves no room for an answer. Please shorten it.",
            param=options.prompt_param,
        )
    if asked is None:
        chosen = left if options.default_max_tokens is None else min(left, options.default_max_tokens)
        if options.sampling.min_tokens > chosen:
            raise invalid("min_tokens", f"must be at most {chosen}, the default of max_tokens for this prompt")
        return chosen
    if asked > left:
        raise BatonError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"This model's maximum context length is {limit} tokens. However, you requested {num_prompt_tokens + asked} "
            f"tokens: {num_prompt_tokens} in the {options.prompt_param} and {asked} in {options.max_tokens_param}.",
            param=options.max_tokens_param,
        )
    return asked
