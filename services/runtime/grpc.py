"""How every process builds gRPC servers and channels, so that limits, keepalive and errors are the same everywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, cast

import grpc
import grpc.aio
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from baton.api.common.v1 import common_pb2
from baton.services.core.errors import BatonError, ConfigurationError, ErrorCode
from baton.services.runtime.net import format_address
from baton.services.runtime.role_check import RoleInterceptor
from baton.services.runtime.tls import CHANNEL_OPTIONS, TLSFiles, channel_credentials, server_credentials

_log = structlog.get_logger(__name__)

# Prompt logprobs of a 128k-token prompt with 20 alternatives take about 20 MB; gRPC's own default is 4 MiB.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# Deadline of calls that only exchange a few fields (status, handshake, cancel). Reservations and streams have their own.
CONTROL_TIMEOUT_S = 5.0

# Trailers count against gRPC's 8 KiB of metadata; an error that overflows them would arrive as a different error.
_MAX_ERROR_MESSAGE_CHARS = 1000

_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]

# A silent peer is noticed after 20 + 8 s at most. Pings also flow when no call is open, since a worker's stream may be idle.
_CLIENT_OPTIONS = [
    *_LIMITS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 8_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Workers come back on another port or soon: do not sit out gRPC's default backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A channel to the same address made after a restart must not reuse the old one's broken connection.
    ("grpc.use_local_subchannel_pool", 1),
    # Peers are inside the installation; a proxy named in the environment is not meant for them.
    ("grpc.enable_http_proxy", 0),
]

_SERVER_OPTIONS = [
    *_LIMITS,
    # Below the clients' 20 s, or the server would end the connection for "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 8_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # On Linux two processes could otherwise listen on one port, each getting some of the calls.
    ("grpc.so_reuseport", 0),
    # Who has connected and does not get on with the handshake: gRPC's own limit is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
]

_STATUS_OF_CODE = {
    ErrorCode.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    ErrorCode.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.NO_WORKERS: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.DRAINING: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorCode.STALE_INCARNATION: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorCode.INCOMPATIBLE: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorCode.HANDOFF_FAILED: grpc.StatusCode.ABORTED,
    ErrorCode.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
    # Not a status that clients try again by themselves.
    ErrorCode.QUARANTINED: grpc.StatusCode.INTERNAL,
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
}

# For statuses that arrive without our details: made by gRPC itself or by something between the two processes.
_CODE_OF_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: ErrorCode.INVALID_REQUEST,
    grpc.StatusCode.NOT_FOUND: ErrorCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: ErrorCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: ErrorCode.FORBIDDEN,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorCode.OVERLOADED,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.FAILED_PRECONDITION: ErrorCode.INCOMPATIBLE,
    grpc.StatusCode.UNAVAILABLE: ErrorCode.WORKER_LOST,
    grpc.StatusCode.CANCELLED: ErrorCode.WORKER_LOST,
}


def create_channel(address: str, tls: TLSFiles | None = None) -> grpc.aio.Channel:
    """A channel to a worker. It connects on first use and reconnects by itself, with the certificates of its making."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=[*_CLIENT_OPTIONS, *CHANNEL_OPTIONS])


def create_server(interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = ()) -> grpc.aio.Server:
    """A server whose handlers may raise BatonError: callers get its code, words and field."""
    return grpc.aio.server(interceptors=[ErrorInterceptor(), *interceptors], options=_SERVER_OPTIONS)


def create_internal_server(tls: TLSFiles) -> grpc.aio.Server:
    """The same for our own processes alone: each call needs a certificate with a role for it."""
    return create_server([RoleInterceptor(lambda: tls.current.certificate.peer.trust_domain)])


def bind_server(server: grpc.aio.Server, host: str, port: int, tls: TLSFiles | None = None) -> int:
    """Listens on ``host:port`` (0: any free one) and returns the port. Raises ConfigurationError where that is impossible."""
    address = format_address(host, port)
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, server_credentials(tls))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ConfigurationError(f"cannot listen on {address}: the port is in use or the address is not this machine's")
    return bound


def enable_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Lets stock clients list and call ``service_names`` without our .proto files."""
    reflection.enable_server_reflection([*service_names, reflection.SERVICE_NAME], server)


def status_of(error: BatonError) -> status_pb2.Status:
    """``error`` as a google.rpc.Status: our own ErrorDetail, and the standard details that stock clients know."""
    message = error.message[:_MAX_ERROR_MESSAGE_CHARS]
    status = status_pb2.Status(code=_STATUS_OF_CODE[error.code].value[0], message=message)
    details: list[Any] = [
        common_pb2.ErrorDetail(code=error.code, message=message, param=error.param or "", retryable=error.retryable),
        error_details_pb2.ErrorInfo(reason=error.code.upper(), domain="baton"),
    ]
    if error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BatonError) -> None:
    """Ends the call with ``error``. Never returns normally."""
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str) -> BatonError:
    """The BatonError that the other side raised, or one made from the status when it is not one of ours."""
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))  # has the four methods that are used
    except ValueError:
        status = None
    detail = common_pb2.ErrorDetail()
    retry_info = error_details_pb2.RetryInfo()
    found, retry_after_s = False, None
    for packed in status.details if status is not None else ():
        found = packed.Unpack(detail) or found
        if packed.Unpack(retry_info):
            retry_after_s = retry_info.retry_delay.ToMilliseconds() / 1000
    if found and detail.code in set(ErrorCode):
        return BatonError(
            ErrorCode(detail.code),
            detail.message,
            param=detail.param or None,
            retryable=detail.retryable,
            retry_after_s=retry_after_s,
        )
    code = _CODE_OF_STATUS.get(error.code(), ErrorCode.INTERNAL)
    retryable = code in (ErrorCode.WORKER_LOST, ErrorCode.OVERLOADED)
    return BatonError(code, f"{peer}: {error.code().name}: {error.details()}", retryable=retryable)


@contextmanager
def rpc_errors(peer: str) -> Iterator[None]:
    """Calls made inside raise BatonError where gRPC raises its own error. ``peer`` names the other side in messages."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, peer) from error


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Turns what handlers raise into statuses. An unforeseen exception is logged here and told to nobody."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = str(handler_call_details.method)
        serialization = {
            "request_deserializer": _tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_guard(handler.unary_unary, method), **serialization)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_guard(handler.stream_unary, method), **serialization)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_guard_stream(handler.unary_stream, method), **serialization)
        return grpc.stream_stream_rpc_method_handler(_guard_stream(handler.stream_stream, method), **serialization)


class _Unreadable:
    """Stands for bytes that are no message of the method's type."""


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """gRPC itself would answer UNKNOWN, with the exception's words."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return read


def _readable(request: Any) -> Any:
    """The request, or the stream of them, as the handler gets it. Raises BatonError in place of what cannot be read."""
    if isinstance(request, _Unreadable):
        raise BatonError(ErrorCode.INVALID_REQUEST, "the bytes sent are not a message of this method's type")
    return _readable_stream(request) if hasattr(request, "__aiter__") else request


async def _readable_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _guard(behavior: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behavior(_readable(request), context)
        except Exception as error:
            await _abort_with(context, error, method)

    return guarded


def _guard_stream(behavior: Callable[..., Any] | None, method: str) -> Callable[..., Any]:
    assert behavior is not None

    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            responses = behavior(_readable(request), context)
            if hasattr(responses, "__aiter__"):
                # Closed here, not when it is garbage: its cleanup cancels what the caller started.
                async with aclosing(responses):
                    async for response in responses:
                        yield response
            else:
                await responses  # a handler that writes through the context
        except Exception as error:
            await _abort_with(context, error, method)

    return guarded


async def _abort_with(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, BatonError):
        if not context.done():  # a caller that has hung up cannot be answered, whatever the answer
            _log.error("rpc failed", method=method, exc_info=error)
        error = BatonError(ErrorCode.INTERNAL, "internal error")
    await abort(context, error)


def service_names(descriptor: Any) -> Sequence[str]:
    """Full names of the services in a generated module's DESCRIPTOR."""
    return [service.full_name for service in descriptor.services_by_name.values()]
