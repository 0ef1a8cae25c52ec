"""The routes that generate. All go: body, options, prompts, then one answer or a stream of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway import anthropic_request, responses_request
from baton.services.gateway.anthropic_answer import MessagesAnswer
from baton.services.gateway.anthropic_models import CountTokensBody, MessagesBody
from baton.services.gateway.anthropic_request import count_options, messages_options
from baton.services.gateway.chat import ChatAnswer, chat_options
from baton.services.gateway.collect import collect
from baton.services.gateway.completions import CompletionAnswer, completion_options
from baton.services.gateway.deps import GatewayDeps, Refusal
from baton.services.gateway.errors import HttpRefusal
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.openai_models import ChatCompletionBody, CompletionBody, GenerationBody
from baton.services.gateway.openapi import json_request
from baton.services.gateway.options import Caller, GenerationOptions
from baton.services.gateway.outlet import Outlet
from baton.services.gateway.pipeline import Generation, prepare, tokenize
from baton.services.gateway.request_body import read_json
from baton.services.gateway.responses_answer import ResponsesAnswer
from baton.services.gateway.responses_models import ResponsesBody
from baton.services.gateway.responses_request import responses_options
from baton.services.gateway.sessions import header_session_id
from baton.services.gateway.slo import parse_slo
from baton.services.gateway.sse import open_stream, unless_gone
from baton.services.gateway.translation import renaming
from baton.services.gateway.validation import parse_body

B = TypeVar("B", GenerationBody, ChatCompletionBody, CompletionBody, ResponsesBody, MessagesBody)
AnyAnswer = ChatAnswer | CompletionAnswer | ResponsesAnswer | MessagesAnswer
_AS_THEY_ARE: Mapping[str, str] = {}
_NOT_KEPT = "Responses are not kept by this server, whatever store says: take them from the answer."
_NO_EMBEDDINGS = "This server generates text and makes no embeddings."


def generation_router(deps: GatewayDeps) -> APIRouter:
    """Chat and text completions, Responses and Messages; and what of these APIs is refused."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=json_request(ChatCompletionBody))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""
        _, generation = await _prepare(deps, request, ChatCompletionBody, chat_options)
        return await _answer(deps, request, ChatAnswer(generation, deps, request.state.request_id))

    @router.post("/v1/completions", openapi_extra=json_request(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continues prompts."""
        _, generation = await _prepare(deps, request, CompletionBody, completion_options)
        return await _answer(deps, request, CompletionAnswer(generation, deps, request.state.request_id))

    @router.post("/v1/responses", openapi_extra=json_request(ResponsesBody))
    async def responses(request: Request) -> Response:
        """Answers a conversation, as OpenAI's Responses API. Nothing is kept."""
        body, generation = await _prepare(deps, request, ResponsesBody, responses_options, responses_request.NAMES)
        return await _answer(deps, request, ResponsesAnswer(generation, deps, request.state.request_id, body))

    @router.api_route("/v1/responses/{response_id:path}", methods=["GET", "DELETE", "POST"], include_in_schema=False)
    async def kept_response(response_id: str) -> Response:
        """Nothing is kept that could be asked for."""
        raise BatonError(ErrorCode.NOT_FOUND, _NOT_KEPT, param="response_id")

    @router.post("/v1/messages", openapi_extra=json_request(MessagesBody))
    async def messages(request: Request) -> Response:
        """Answers a conversation, as Anthropic's Messages API."""
        _, generation = await _prepare(deps, request, MessagesBody, messages_options, anthropic_request.NAMES)
        return await _answer(deps, request, MessagesAnswer(generation, deps, request.state.request_id))

    @router.post("/v1/messages/count_tokens", openapi_extra=json_request(CountTokensBody))
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a conversation has."""
        body = parse_body(CountTokensBody, await read_json(request, deps.limits))
        with renaming(anthropic_request.NAMES):
            options = count_options(body, deps)
            token_ids = await unless_gone(request.receive, tokenize(deps, options.prompts[0], "messages"))
        return Response(orjson.dumps({"input_tokens": len(token_ids)}), media_type="application/json")

    @router.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        """There are none."""
        raise HttpRefusal(400, "not_supported", _NO_EMBEDDINGS)

    return router


async def _prepare(
    deps: GatewayDeps,
    request: Request,
    kind: type[B],
    to_options: Callable[[B, GatewayDeps], GenerationOptions],
    names: Mapping[str, str] = _AS_THEY_ARE,
) -> tuple[B, Generation]:
    """Everything before the first token is asked for. What is refused here is told to ``on_refused``.

    ``names``: what this API calls fields that the shared checks call otherwise.
    """
    slo = SloTarget()
    try:
        body = parse_body(kind, await read_json(request, deps.limits))
        slo = parse_slo(request.headers, body.slo)
        with renaming(names):
            options = to_options(body, deps)
        caller = Caller(
            receipt_id=request.state.request_id,
            tenant=request.state.tenant,
            received_s=request.state.received_s,
            slo=slo,
            timeout_s=deps.limits.request_timeout_s,
            session_id=header_session_id(request.headers),
        )
        with renaming(names):
            return body, await unless_gone(request.receive, prepare(deps, options, caller))
    except BatonError as error:
        deps.on_refused(Refusal(request.state.request_id, error.code, slo))
        raise


async def _answer(deps: GatewayDeps, request: Request, answer: AnyAnswer) -> Response:
    if answer.generation.options.stream:
        outlet = Outlet()
        events = answer.chunks(outlet)
        return await open_stream(request.receive, events, deps.limits.keepalive_s, deps.cut, answer.form, outlet)
    choices: Any = await unless_gone(request.receive, collect(answer.generation), deps.cut)
    return Response(answer.whole(choices), media_type="application/json")
