"""Keeps calls of the wrong peers out of a gRPC server, and says so in the log, sparingly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from baton.services.runtime.certificates import peer_of
from baton.services.runtime.peers import ALLOWED, ANYBODY, refusal
from baton.services.runtime.sparingly import Sparingly


class RoleInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Refuses calls of peers whose certificate has not the role for them: PERMISSION_DENIED, and a line in the log."""

    def __init__(self, trust_domain: Callable[[], str]) -> None:
        self._trust_domain = trust_domain
        self._log = Sparingly()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or ALLOWED.get(method) == ANYBODY:
            return handler
        serialization = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        check = self._check
        if handler.unary_unary or handler.stream_unary:
            answer: Any = handler.unary_unary or handler.stream_unary

            async def checked(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                await check(method, context)
                return await answer(request, context)

            make = grpc.unary_unary_rpc_method_handler if handler.unary_unary else grpc.stream_unary_rpc_method_handler
            return make(checked, **serialization)
        stream: Any = handler.unary_stream or handler.stream_stream

        async def checked_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            await check(method, context)
            responses = stream(request, context)
            if not hasattr(responses, "__aiter__"):
                await responses
                return
            async with aclosing(responses):
                async for response in responses:
                    yield response

        make_stream = (
            grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.stream_stream_rpc_method_handler
        )
        return make_stream(checked_stream, **serialization)

    async def _check(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        shown = context.auth_context()
        peer = peer_of([uri.decode("utf-8", "replace") for uri in shown.get("peer_uri", ())])
        why = refusal(peer, self._trust_domain(), ALLOWED.get(method, frozenset({"(nobody)"})))
        if why is None:
            return
        address = context.peer()
        self._log.warn(
            "tls_peer_refused",
            f"{address.rpartition(':')[0]} {peer} {method}",
            peer=address,
            certificate=str(peer),
            method=method,
            reason=why,
        )
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{method}: {why}")
