"""Failures as clients see them: a fixed catalogue of statuses, types and words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import orjson
import structlog
from starlette.responses import Response

from baton.services.core.errors import BatonError, ErrorCode

_log = structlog.get_logger(__name__)

MAX_MESSAGE_CHARS = 1000
DEFAULT_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class _Entry:
    status: int
    type: str
    # For failures inside: what is said instead of the cause, which is only logged.
    public_message: str | None = None


ANTHROPIC_PATHS = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_LATER = "Please try again shortly."
_CATALOGUE: dict[ErrorCode, _Entry] = {
    ErrorCode.INVALID_REQUEST: _Entry(400, "invalid_request_error"),
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: _Entry(400, "invalid_request_error"),
    ErrorCode.MODEL_NOT_FOUND: _Entry(404, "invalid_request_error"),
    ErrorCode.NOT_FOUND: _Entry(404, "invalid_request_error"),
    ErrorCode.UNAUTHENTICATED: _Entry(401, "authentication_error"),
    ErrorCode.FORBIDDEN: _Entry(403, "permission_error"),
    ErrorCode.RATE_LIMITED: _Entry(429, "rate_limit_error"),
    ErrorCode.QUOTA_EXCEEDED: _Entry(429, "rate_limit_error"),
    ErrorCode.OVERLOADED: _Entry(503, "overloaded_error", f"The server is at its limit of requests. {_LATER}"),
    ErrorCode.NO_WORKERS: _Entry(503, "server_error", f"No workers can take this request now. {_LATER}"),
    ErrorCode.DRAINING: _Entry(503, "server_error", f"The server is shutting down. {_LATER}"),
    ErrorCode.DEADLINE_EXCEEDED: _Entry(504, "server_error", "The request ran out of time."),
    ErrorCode.STALE_INCARNATION: _Entry(503, "server_error", f"A worker restarted under the request. {_LATER}"),
    ErrorCode.INCOMPATIBLE: _Entry(503, "server_error", "The workers cannot serve this request together."),
    ErrorCode.HANDOFF_FAILED: _Entry(503, "server_error", f"Handing the request over failed. {_LATER}"),
    ErrorCode.WORKER_LOST: _Entry(503, "server_error", f"A worker was lost under the request. {_LATER}"),
    ErrorCode.QUARANTINED: _Entry(
        500, "server_error", "Several workers were lost under this request. It will not be tried again."
    ),
    ErrorCode.INTERNAL: _Entry(500, "server_error", "Internal error."),
}


def invalid(param: str, problem: str) -> BatonError:
    """The error for a field: ``problem`` continues a sentence that begins with its name."""
    return BatonError(ErrorCode.INVALID_REQUEST, f"{param} {problem}", param=param)


class HttpRefusal(BatonError):
    """A request that fails as HTTP, before it means anything: 405, 408, 413, 415, 431."""

    def __init__(self, status: int, http_code: str, message: str) -> None:
        super().__init__(ErrorCode.INVALID_REQUEST, message)
        self.status = status
        self.http_code = http_code


@dataclass(frozen=True, slots=True)
class PublicError:
    """What may leave the process."""

    status: int
    type: str
    message: str
    param: str | None
    code: str
    retry_after_s: float | None

    def body(self) -> bytes:
        """The error object of the contract: always these four keys."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": fields})

    def anthropic_body(self) -> bytes:
        """The same as Anthropic writes it."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": self.message}})

    def response(self, path: str = "") -> Response:
        """``path``: what was asked for; clients of Anthropic's API are answered in its form."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.code == ErrorCode.QUARANTINED:  # OpenAI's clients try a 500 again unless told otherwise
            headers["x-should-retry"] = "false"
        if self.status in (408, 413, 431):  # the rest of the request is not read
            headers["connection"] = "close"
        body = self.anthropic_body() if path.startswith(ANTHROPIC_PATHS) else self.body()
        return Response(body, self.status, headers, "application/json")


def public_error(error: BaseException) -> PublicError:
    """The public face of any failure. Causes inside are logged here and told to nobody."""
    if not isinstance(error, BatonError):
        _log.error("request failed", exc_info=error)
        error = BatonError(ErrorCode.INTERNAL, "unforeseen")
    entry = _CATALOGUE[error.code]
    if entry.public_message is not None and entry.status != 500:
        # Refusals for want of room come by the thousand when there is least time to write of them; they are counted.
        write = _log.debug if error.code is ErrorCode.OVERLOADED else _log.warning
        write("request failed", code=error.code.value, cause=error.message)
    status, code = entry.status, error.code.value
    if isinstance(error, HttpRefusal):
        status, code = error.status, error.http_code
    retry_after_s = error.retry_after_s
    if retry_after_s is None and status == 503:
        retry_after_s = DEFAULT_RETRY_AFTER_S
    message = entry.public_message or error.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 3] + "..."
    return PublicError(status, entry.type, message, error.param, code, retry_after_s)


def public_baton_error(error: BatonError) -> BatonError:
    """The same for gRPC: an error with the public words, to be sent as a status."""
    public = public_error(error)
    return BatonError(
        error.code,
        public.message,
        param=public.param,
        retryable=error.retryable,
        retry_after_s=public.retry_after_s,
    )
