"""POST /tokenize and /detokenize: the model's own view of text."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from baton.services.gateway.deps import GatewayDeps
from baton.services.gateway.openai_models import DetokenizeBody, TokenizeBody
from baton.services.gateway.openapi import json_request
from baton.services.gateway.prompts import parse_chat
from baton.services.gateway.request_body import read_json
from baton.services.gateway.sse import unless_gone
from baton.services.gateway.validation import check_token_ids, invalid, parse_body


def text_router(deps: GatewayDeps) -> APIRouter:
    """Text to tokens and back."""
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=json_request(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or a conversation, as a generation would use them."""
        body = parse_body(TokenizeBody, await read_json(request, deps.limits))
        deps.model.resolve(body.model)
        token_ids = await unless_gone(request.receive, _tokenize(deps, body))
        answer: dict[str, object] = {
            "count": len(token_ids),
            "max_model_len": deps.model.max_model_len,
            "tokens": token_ids,
            "token_strs": [deps.tokenizer.pieces.name(i) for i in token_ids] if body.return_token_strs else None,
        }
        return Response(orjson.dumps(answer), media_type="application/json")

    @router.post("/detokenize", openapi_extra=json_request(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """Text of token ids, with special tokens, but without those that /tokenize adds by itself."""
        body = parse_body(DetokenizeBody, await read_json(request, deps.limits))
        deps.model.resolve(body.model)
        check_token_ids("tokens", body.tokens, deps.model.vocab_size)
        text = await unless_gone(request.receive, deps.tokenizer.decode(body.tokens))
        return Response(orjson.dumps({"prompt": text}), media_type="application/json")

    return router


async def _tokenize(deps: GatewayDeps, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "or messages is required, and only one of them")
    # Not bound by the context length: whoever asks how long a text is may be about to find out that it is too long.
    max_tokens = deps.limits.max_body_bytes
    if body.messages is not None:
        prompt = parse_chat(
            body.messages,
            tokenizer=deps.tokenizer,
            limits=deps.limits,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )
        return await deps.tokenizer.encode_chat(prompt.messages, prompt.options, max_tokens=max_tokens)
    assert body.prompt is not None
    add_special_tokens = body.add_special_tokens is not False
    return await deps.tokenizer.encode(
        body.prompt, add_special_tokens=add_special_tokens, max_tokens=max_tokens, param="prompt"
    )
