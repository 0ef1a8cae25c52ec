"""POST /v1/completions: the body's meaning, and the shapes of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from baton.services.core.request import TokenLogprobs
from baton.services.gateway.choice import ChoicePiece, OutputToken
from baton.services.gateway.collect import CollectedChoice
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.logprobs import completion_logprobs, prompt_as_tokens, prompt_logprobs
from baton.services.gateway.openai_models import CompletionBody
from baton.services.gateway.options import GenerationOptions
from baton.services.gateway.pipeline import Generation
from baton.services.gateway.prompts import parse_prompts
from baton.services.gateway.rendering import Answer, ChunkText
from baton.services.gateway.sse import event
from baton.services.gateway.structured_outputs import parse_grammar
from baton.services.gateway.validation import check_range, invalid, make_options

# OpenAI's default for this API.
DEFAULT_MAX_TOKENS = 16


def completion_options(
    body: CompletionBody, deps: GatewayDeps, default_max_tokens: int | None = DEFAULT_MAX_TOKENS
) -> GenerationOptions:
    """What a completion request asks for. Raises INVALID_REQUEST or MODEL_NOT_FOUND."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of", "must be the same as n: choices are not ranked by this server")
    check_range("logprobs", body.logprobs, 0, deps.limits.max_logprobs)
    prompts = parse_prompts(
        body.prompt,
        add_special_tokens=body.add_special_tokens is not False,
        tokenizer=deps.tokenizer,
        vocab_size=deps.model.vocab_size,
        limits=deps.limits,
    )
    return make_options(
        body,
        prompts,
        prompt_param="prompt",
        model=deps.model,
        limits=deps.limits,
        num_logprobs=body.logprobs,
        max_tokens=body.max_tokens,
        default_max_tokens=default_max_tokens,
        echo=bool(body.echo),
        grammar=parse_grammar(body, deps.limits),
    )


class CompletionAnswer(Answer):
    """Renders one completion generation, whole or as chunks."""

    id_prefix = "cmpl-"
    object_name = "text_completion"

    def __init__(self, generation: Generation, deps: GatewayDeps, receipt_id: str) -> None:
        super().__init__(generation, deps, receipt_id)
        num_choices = range(generation.options.num_choices)
        self._texts = [ChunkText(self._chunk(index, "", None), field=b'"text":') for index in num_choices]
        self._prompt_chars: dict[int, int] = {}

    def whole(self, choices: list[CollectedChoice]) -> bytes:
        """The JSON body of an answer that is not streamed."""
        body = self.envelope(self.object_name)
        body["choices"] = [self._whole_choice(choice) for choice in choices]
        body["usage"] = self.usage()
        return orjson.dumps(body)

    def _whole_choice(self, choice: CollectedChoice) -> dict[str, Any]:
        rendered = {
            "index": choice.index,
            "text": choice.prompt_text + choice.text,
            "logprobs": self._logprobs(choice.index, choice.tokens, choice.prompt_text, choice.prompt_logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.generation.options.prompt_logprobs:
            prompt_ids, pieces = self.generation.prompt_of(choice.index), self.deps.tokenizer.pieces
            rendered["prompt_logprobs"] = prompt_logprobs(prompt_ids, choice.prompt_logprobs, pieces)
        return rendered | self.token_ids(choice.index, choice.tokens, with_prompt=True)

    def render(self, piece: ChoicePiece) -> bytes:
        index = piece.choice_index
        if piece.is_first:
            self._prompt_chars[index] = len(piece.prompt_text)
        if not self._is_plain or piece.finish_reason is not None:
            if piece.num_tokens or piece.is_first or piece.finish_reason is not None:
                return event(self._piece_chunk(piece, self._prompt_chars[index]))
            return b""
        if piece.prompt_text:
            return self._texts[index].render(piece.prompt_text + piece.text)
        return self._texts[index].render_each(piece.texts)

    def ending(self) -> bytes:
        if not self.generation.options.include_usage:
            return b""
        return event(self.envelope(self.object_name) | {"choices": [], "usage": self.usage()})

    def _piece_chunk(self, piece: ChoicePiece, prompt_chars: int) -> dict[str, Any]:
        chunk = self._chunk(piece.choice_index, piece.prompt_text + piece.text, piece.finish_reason, piece.num_tokens)
        choice = chunk["choices"][0]
        if piece.is_first:
            logprobs = self._logprobs(piece.choice_index, piece.tokens, piece.prompt_text, piece.prompt_logprobs)
        else:
            logprobs = self._output_logprobs(piece.tokens, prompt_chars)
        choice["logprobs"] = logprobs
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        choice |= self.token_ids(piece.choice_index, piece.tokens, with_prompt=piece.is_first)
        return chunk

    def _chunk(self, index: int, text: str, finish_reason: str | None, num_tokens: int = 0) -> dict[str, Any]:
        chunk = self.envelope(self.object_name)
        chunk["choices"] = [{"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}]
        return chunk | self.chunk_usage(num_tokens)

    def _logprobs(
        self,
        index: int,
        tokens: Sequence[OutputToken],
        prompt_text: str,
        prompt_logprobs: Sequence[TokenLogprobs | None] | None,
    ) -> dict[str, list[Any]] | None:
        """Logprobs of a choice from its beginning: with echo, the prompt's come first."""
        output = self._output_logprobs(tokens, len(prompt_text))
        options, tokenizer = self.generation.options, self.deps.tokenizer
        if output is None or not options.echo or prompt_logprobs is None:
            return output
        detokenizer = tokenizer.detokenizer([], skip_special_tokens=options.skip_special_tokens)
        prompt = prompt_as_tokens(self.generation.prompt_of(index), prompt_logprobs, detokenizer)
        lists = completion_logprobs(prompt, tokenizer.pieces, 0)
        return {name: lists[name] + output[name] for name in lists}

    def _output_logprobs(self, tokens: Sequence[OutputToken], prompt_chars: int) -> dict[str, list[Any]] | None:
        if self.generation.options.sampling.num_logprobs is None:
            return None
        return completion_logprobs(tokens, self.deps.tokenizer.pieces, prompt_chars)
