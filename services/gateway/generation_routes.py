"""The routes that generate. Both go: body, options, prompts, then one answer or a stream of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from baton.services.core.errors import BatonError
from baton.services.gateway.chat import ChatAnswer, chat_options
from baton.services.gateway.collect import collect
from baton.services.gateway.completions import CompletionAnswer, completion_options
from baton.services.gateway.deps import GatewayDeps, Refusal
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.openai_models import ChatCompletionBody, CompletionBody, GenerationBody
from baton.services.gateway.openapi import json_request
from baton.services.gateway.options import Caller, GenerationOptions
from baton.services.gateway.pipeline import Generation, prepare
from baton.services.gateway.request_body import read_json
from baton.services.gateway.slo import parse_slo
from baton.services.gateway.sse import open_stream, unless_gone
from baton.services.gateway.validation import parse_body

B = TypeVar("B", bound=GenerationBody)


def generation_router(deps: GatewayDeps) -> APIRouter:
    """POST /v1/chat/completions and /v1/completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=json_request(ChatCompletionBody))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""
        generation = await _prepare(deps, request, ChatCompletionBody, chat_options)
        return await _answer(deps, request, ChatAnswer(generation, deps, request.state.request_id))

    @router.post("/v1/completions", openapi_extra=json_request(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continues prompts."""
        generation = await _prepare(deps, request, CompletionBody, completion_options)
        return await _answer(deps, request, CompletionAnswer(generation, deps, request.state.request_id))

    return router


async def _prepare(
    deps: GatewayDeps, request: Request, kind: type[B], to_options: Callable[[B, GatewayDeps], GenerationOptions]
) -> Generation:
    """Everything before the first token is asked for. What is refused here is told to ``on_refused``."""
    slo = SloTarget()
    try:
        body = parse_body(kind, await read_json(request, deps.limits))
        slo = parse_slo(request.headers, body.slo)
        options = to_options(body, deps)
        caller = Caller(
            receipt_id=request.state.request_id,
            tenant=request.state.tenant,
            received_s=request.state.received_s,
            slo=slo,
            timeout_s=deps.limits.request_timeout_s,
        )
        return await unless_gone(request.receive, prepare(deps, options, caller))
    except BatonError as error:
        deps.on_refused(Refusal(request.state.request_id, error.code, slo))
        raise


async def _answer(deps: GatewayDeps, request: Request, answer: ChatAnswer | CompletionAnswer) -> Response:
    if answer.generation.options.stream:
        return await open_stream(request.receive, answer.chunks(), deps.limits.keepalive_s, deps.cut)
    choices: Any = await unless_gone(request.receive, collect(answer.generation), deps.cut)
    return Response(answer.whole(choices), media_type="application/json")
