"""gRPC InferenceService: the same validation and generation as REST, in protobuf."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc

from baton.api.common.v1 import common_pb2 as pb
from baton.api.inference.v1 import inference_pb2, inference_pb2_grpc
from baton.services.core.errors import BatonError
from baton.services.core.request import FinishReason, SampledToken
from baton.services.core.tenants import Tenant
from baton.services.gateway.boundary import check_request_id, inside, new_request_id
from baton.services.gateway.choice import ChoicePiece
from baton.services.gateway.deps import GatewayDeps, Refusal
from baton.services.gateway.errors import public_baton_error
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.grpc_request import renamed_for, request_options
from baton.services.gateway.options import Caller
from baton.services.gateway.parts import CallBegin, Thought
from baton.services.gateway.pipeline import Generation, prepare
from baton.services.gateway.reading import TOOL_CALLS
from baton.services.gateway.sessions import header_session_id
from baton.services.gateway.slo import parse_slo
from baton.services.gateway.tools.calls import CallArguments, Text
from baton.services.gateway.translation import parts_of
from baton.services.runtime import convert


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves on a server that turns BatonError into statuses (``runtime.grpc.create_server``)."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        """Every name that can be asked for."""
        self._tenant(context)
        model = self._deps.model
        models = [inference_pb2.Model(id=name, max_model_len=model.max_model_len) for name in model.names]
        return inference_pb2.ListModelsResponse(models=models)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Writes pieces as they are made. A cancelled call cancels the generation, whatever it waits for."""
        receipt_id, slo = request.request_id or new_request_id(), SloTarget()
        received_s = self._deps.clock()
        try:
            tenant = self._tenant(context)
            with inside(self._deps, tenant):
                check_request_id(receipt_id)
                slo = parse_slo(_metadata(context), None)
                options = replace(request_options(request, self._deps), return_token_ids=True)
                session_id = header_session_id(_metadata(context))
                caller = Caller(receipt_id, tenant, received_s, slo, self._timeout_s(context), session_id)
                generation = await prepare(self._deps, options, caller)
                await self._write(generation, receipt_id, context)
        except _DispatchedError as error:
            raise public_baton_error(error.cause) from error
        except BatonError as error:
            self._deps.on_refused(Refusal(receipt_id, error.code, slo))
            raise public_baton_error(renamed_for(error, request)) from error

    def _tenant(self, context: grpc.aio.ServicerContext[Any, Any]) -> Tenant:
        metadata = _metadata(context)
        try:
            return self._deps.authenticator.tenant(metadata.get("authorization"), metadata.get("x-api-key"))
        except BatonError as error:
            raise BatonError(error.code, "A valid API key is needed: metadata 'authorization: Bearer KEY'.") from error

    def _timeout_s(self, context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
        """The caller's deadline or the gateway's limit, whichever comes first."""
        limits = [self._deps.limits.request_timeout_s, context.time_remaining()]
        shortest = min((limit for limit in limits if limit is not None), default=math.inf)
        return shortest if math.isfinite(shortest) else None

    async def _write(
        self, generation: Generation, receipt_id: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        num_open = generation.options.num_choices
        async with aclosing(_dispatched(generation.stream())) as pieces:
            async for piece in pieces:
                num_open -= piece.finish_reason is not None
                if not piece.tokens and not piece.text and piece.finish_reason is None:
                    continue
                response = _response(piece, receipt_id)
                if piece.is_first and generation.options.prompt_logprobs and piece.prompt_logprobs is not None:
                    prompt = generation.prompt_of(piece.choice_index)
                    response.prompt_tokens.extend(
                        convert.token_to_wire(SampledToken(token_id, logprobs))
                        for token_id, logprobs in zip(prompt, piece.prompt_logprobs, strict=True)
                    )
                if num_open == 0:
                    usage = generation.usage
                    response.usage.prompt_tokens = usage.prompt_tokens
                    response.usage.completion_tokens = usage.completion_tokens
                    response.usage.cached_tokens = usage.cached_tokens
                    response.usage.reasoning_tokens = usage.reasoning_tokens
                await context.write(response)


class _DispatchedError(Exception):
    """A failure behind the dispatcher: it has been counted there."""

    def __init__(self, cause: BatonError) -> None:
        super().__init__(cause.message)
        self.cause = cause


async def _dispatched(pieces: AsyncGenerator[ChoicePiece, None]) -> AsyncGenerator[ChoicePiece, None]:
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece
    except BatonError as error:
        raise _DispatchedError(error) from error


def _response(piece: ChoicePiece, receipt_id: str) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        id=receipt_id,
        index=piece.choice_index,
        tokens=[convert.token_to_wire(token.sampled) for token in piece.tokens],
        finish_reason=_finish_reason(piece.finish_reason),
        text=piece.prompt_text,
    )
    for part in parts_of(piece):
        match part:
            case Text(text):
                response.text += text
            case Thought(text):
                response.reasoning += text
            case CallBegin(index, call_id, name):
                response.tool_calls.add(index=index, id=call_id, name=name)
            case CallArguments(index, text):
                response.tool_calls.add(index=index, arguments=text)
    if isinstance(piece.stop_reason, str):
        response.stop_string = piece.stop_reason
    elif piece.stop_reason is not None:
        response.stop_token_id = piece.stop_reason
    return response


def _finish_reason(reason: str | None) -> pb.FinishReason:
    if reason == TOOL_CALLS:
        return pb.FINISH_REASON_TOOL_CALLS
    return convert.finish_reason_to_wire(None if reason is None else FinishReason(reason))


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
