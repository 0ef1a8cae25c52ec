"""The one error tree. Raised anywhere, carried over gRPC as a code, turned into a public body only by the gateway."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable names of failures; programs may match them."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    UNAUTHENTICATED = "invalid_api_key"
    FORBIDDEN = "permission_denied"
    RATE_LIMITED = "rate_limit_exceeded"
    QUOTA_EXCEEDED = "insufficient_quota"
    OVERLOADED = "overloaded"
    NO_WORKERS = "no_workers"
    DRAINING = "draining"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    STALE_INCARNATION = "stale_incarnation"
    INCOMPATIBLE = "incompatible"
    HANDOFF_FAILED = "kv_handoff_failed"
    WORKER_LOST = "worker_lost"
    QUARANTINED = "request_quarantined"
    INTERNAL = "internal_error"


class BatonError(Exception):
    """A failure with a code, words for people, and whether another attempt may succeed.

    ``param`` names the request field at fault. ``retry_after_s`` is set where waiting helps. ``cause`` is a more exact code
    where there is one.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retryable: bool = False,
        retry_after_s: float | None = None,
        cause: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.cause = cause


class ConfigurationError(BatonError):
    """Settings or files that cannot be served. The process prints it as one line and exits with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.INVALID_REQUEST, message)
