"""gRPC InferenceService: the same validation and generation as REST, in protobuf."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from baton.api.inference.v1 import inference_pb2, inference_pb2_grpc
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason
from baton.services.core.tenants import Tenant
from baton.services.gateway.boundary import check_request_id, inside, new_request_id
from baton.services.gateway.chat import chat_options
from baton.services.gateway.choice import ChoicePiece
from baton.services.gateway.completions import completion_options
from baton.services.gateway.deps import GatewayDeps, Refusal
from baton.services.gateway.errors import public_baton_error
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.openai_models import ChatCompletionBody, CompletionBody
from baton.services.gateway.options import Caller, GenerationOptions
from baton.services.gateway.pipeline import Generation, prepare
from baton.services.gateway.slo import parse_slo
from baton.services.gateway.validation import invalid, parse_body
from baton.services.runtime import convert

_OPTIONAL = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "min_tokens", "n"),
)
# What shared checks call a field, and what it is called here.
_CHAT_FIELDS = {"messages": "chat.messages", "top_logprobs": "logprobs"}
_FIELDS = {"text": {"prompt": "text"}, "tokens": {"prompt": "tokens.token_ids"}, "chat": _CHAT_FIELDS}


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
                options = self._options(request)
                caller = Caller(receipt_id, tenant, received_s, slo, self._timeout_s(context))
                generation = await prepare(self._deps, options, caller)
                await self._write(generation, receipt_id, context)
        except _DispatchedError as error:
            raise public_baton_error(error.cause) from error
        except BatonError as error:
            self._deps.on_refused(Refusal(receipt_id, error.code, slo))
            raise public_baton_error(_renamed(error, request)) from error

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

    def _options(self, request: inference_pb2.GenerateRequest) -> GenerationOptions:
        fields = {name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)}
        fields |= {
            "model": request.model or None,
            "stop": list(request.stop) or None,
            "stop_token_ids": list(request.stop_token_ids) or None,
            "ignore_eos": request.ignore_eos,
            "cache_salt": request.cache_salt or None,
        }
        logprobs = request.logprobs if request.HasField("logprobs") else None
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise invalid("prompt", "is required: one of text, tokens and chat")
        if kind == "chat":
            fields["messages"] = [
                {"role": message.role, "content": message.content} for message in request.chat.messages
            ]
            fields |= {"logprobs": logprobs is not None, "top_logprobs": logprobs}
            return chat_options(parse_body(ChatCompletionBody, fields), self._deps)
        fields["prompt"] = request.text if kind == "text" else list(request.tokens.token_ids)
        fields["logprobs"] = logprobs
        return completion_options(parse_body(CompletionBody, fields), self._deps, default_max_tokens=None)

    async def _write(
        self, generation: Generation, receipt_id: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        num_open = generation.options.num_choices
        async with aclosing(_dispatched(generation.stream())) as pieces:
            async for piece in pieces:
                num_open -= piece.finish_reason is not None
                if not piece.tokens and not piece.text and piece.finish_reason is None:
                    continue
                response = inference_pb2.GenerateResponse(
                    id=receipt_id,
                    index=piece.choice_index,
                    text=piece.text,
                    tokens=[convert.token_to_wire(token.sampled) for token in piece.tokens],
                    finish_reason=convert.finish_reason_to_wire(
                        None if piece.finish_reason is None else FinishReason(piece.finish_reason)
                    ),
                )
                if num_open == 0:
                    usage = generation.usage
                    response.usage.prompt_tokens = usage.prompt_tokens
                    response.usage.completion_tokens = usage.completion_tokens
                    response.usage.cached_tokens = usage.cached_tokens
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


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _renamed(error: BatonError, request: inference_pb2.GenerateRequest) -> BatonError:
    """``error`` with its field called what it is called in GenerateRequest."""
    if error.param is None or error.code is ErrorCode.UNAUTHENTICATED:
        return error
    names = {"x-request-id": "request_id"} | _FIELDS.get(request.WhichOneof("prompt") or "", {})
    for rest_name, name in names.items():
        if error.param == rest_name or error.param.startswith((f"{rest_name}[", f"{rest_name}.")):
            param = name + error.param[len(rest_name) :]
            message = error.message
            if message.startswith(error.param):
                message = param + message[len(error.param) :]
            return BatonError(error.code, message, param=param)
    return error
