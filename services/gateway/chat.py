"""POST /v1/chat/completions: the body's meaning, and the shapes of its answers."""

from __future__ import annotations

from typing import Any, TypeGuard

import orjson

from baton.services.gateway.chat_message import delta_of, message_of
from baton.services.gateway.choice import ChoicePiece, OutputToken
from baton.services.gateway.collect import CollectedChoice
from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.logprobs import chat_logprobs, prompt_logprobs
from baton.services.gateway.openai_models import ChatCompletionBody
from baton.services.gateway.options import GenerationOptions
from baton.services.gateway.parts import Part
from baton.services.gateway.pipeline import Generation
from baton.services.gateway.prompts import parse_chat
from baton.services.gateway.reading import Reading
from baton.services.gateway.rendering import Answer, ChunkText
from baton.services.gateway.sse import event
from baton.services.gateway.structured_outputs import parse_grammar
from baton.services.gateway.tools.calls import Text
from baton.services.gateway.tools.offer import parse_tools
from baton.services.gateway.validation import check_range, invalid, make_options


def chat_options(body: ChatCompletionBody, deps: GatewayDeps) -> GenerationOptions:
    """What a chat request asks for. Raises INVALID_REQUEST or MODEL_NOT_FOUND."""
    if body.add_special_tokens:
        raise invalid("add_special_tokens", "is not supported here: the chat template adds them")
    check_range("top_logprobs", body.top_logprobs, 0, deps.limits.max_logprobs)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    offer = parse_tools(body.tools, body.tool_choice, body.parallel_tool_calls, deps.limits)
    if offer is not None and deps.tool_format is None:
        raise invalid("tools", "cannot be used: how this model calls tools is not known; see --tool-call-parser")
    prompt = parse_chat(
        body.messages,
        tokenizer=deps.tokenizer,
        limits=deps.limits,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
        tools=None if offer is None else offer.definitions(),
    )
    newer_name = body.max_completion_tokens is not None
    return make_options(
        body,
        (prompt,),
        prompt_param="messages",
        model=deps.model,
        limits=deps.limits,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=body.max_completion_tokens if newer_name else body.max_tokens,
        max_tokens_param="max_completion_tokens" if newer_name else "max_tokens",
        grammar=parse_grammar(body, deps.limits),
        reading=Reading(deps.thoughts, offer, deps.tool_format),
    )


class ChatAnswer(Answer):
    """Renders one chat generation, whole or as chunks."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"

    def __init__(self, generation: Generation, deps: GatewayDeps, receipt_id: str) -> None:
        super().__init__(generation, deps, receipt_id)
        chunks = [self._chunk(index, {"content": ""}, None) for index in range(generation.options.num_choices)]
        self._texts = [ChunkText(chunk, field=b'"content":') for chunk in chunks]

    def whole(self, choices: list[CollectedChoice]) -> bytes:
        """The JSON body of an answer that is not streamed."""
        body = self.envelope(self.object_name)
        body["choices"] = [self._choice(choice) for choice in choices]
        body["usage"] = self.usage()
        pieces, generation = self.deps.tokenizer.pieces, self.generation
        if generation.options.prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(generation.prompt_of(0), choices[0].prompt_logprobs, pieces)
        return orjson.dumps(body)

    def _choice(self, choice: CollectedChoice) -> dict[str, Any]:
        rendered = {
            "index": choice.index,
            "message": message_of([Text(choice.text)] if choice.parts is None else choice.parts),
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        return rendered | self.token_ids(choice.index, choice.tokens, with_prompt=True)

    def render(self, piece: ChoicePiece) -> bytes:
        first = self._first_chunk(piece) if piece.is_first else b""
        return first + self._events(piece)

    def _events(self, piece: ChoicePiece) -> bytes:
        is_plain, text = self._is_plain and piece.finish_reason is None, self._texts[piece.choice_index]
        if piece.parts is None:
            if is_plain:
                return text.render_each(piece.texts)
            if piece.num_tokens or piece.finish_reason is not None:
                return event(self._piece_chunk(piece, {"content": piece.text} if piece.text else {}))
            return b""
        if is_plain and _is_text(piece.parts):
            return b"".join(text.render(part.text) for part in piece.parts)
        return b"".join(map(event, self._part_chunks(piece)))

    def ending(self) -> bytes:
        if not self.generation.options.include_usage:
            return b""
        return event(self.envelope(self.object_name + ".chunk") | {"choices": [], "usage": self.usage()})

    def _first_chunk(self, piece: ChoicePiece) -> bytes:
        chunk = self._chunk(piece.choice_index, {"role": "assistant", "content": ""}, finish_reason=None)
        chunk["choices"][0] |= self.token_ids(piece.choice_index, (), with_prompt=True)
        return event(chunk)

    def _part_chunks(self, piece: ChoicePiece) -> list[dict[str, Any]]:
        """A chunk for each part; the last one has what belongs to the piece."""
        deltas = [delta_of(part) for part in piece.parts or ()]
        if piece.finish_reason is None and (self._is_plain or not piece.num_tokens):
            return [self._chunk(piece.choice_index, delta, None) for delta in deltas]
        earlier, last = deltas[:-1], deltas[-1] if deltas else {}
        chunks = [self._chunk(piece.choice_index, delta, None) for delta in earlier]
        return [*chunks, self._piece_chunk(piece, last)]

    def _piece_chunk(self, piece: ChoicePiece, delta: dict[str, Any]) -> dict[str, Any]:
        chunk = self._chunk(piece.choice_index, delta, piece.finish_reason, piece.num_tokens)
        choice = chunk["choices"][0]
        choice["logprobs"] = self._logprobs(piece.tokens)
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        choice |= self.token_ids(piece.choice_index, piece.tokens, with_prompt=False)
        return chunk

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None, num_tokens: int = 0
    ) -> dict[str, Any]:
        chunk = self.envelope(self.object_name + ".chunk")
        chunk["choices"] = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        return chunk | self.chunk_usage(num_tokens)

    def _logprobs(self, tokens: list[OutputToken] | tuple[OutputToken, ...]) -> dict[str, Any] | None:
        if self.generation.options.sampling.num_logprobs is None:
            return None
        return {"content": chat_logprobs(tokens, self.deps.tokenizer.pieces)}


def _is_text(parts: tuple[Part, ...]) -> TypeGuard[tuple[Text, ...]]:
    return all(isinstance(part, Text) for part in parts)
