"""Reading a JSON body within limits of size, depth and time."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.errors import HttpRefusal
from baton.services.gateway.limits import Limits
from baton.services.gateway.sse import ClientGoneError


async def read_json(request: Request, limits: Limits) -> Any:
    """The body as JSON. orjson refuses NaN, lone surrogates and more than 1,024 levels by itself.

    Raises HttpRefusal with 413, 415 or 408, INVALID_REQUEST for what is not JSON, ClientGoneError.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HttpRefusal(415, "unsupported_media_type", "The body must be JSON: send content-type: application/json.")
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        message = f"The body did not arrive within {limits.body_timeout_s:g} s."
        raise HttpRefusal(408, "request_timeout", message) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise BatonError(ErrorCode.INVALID_REQUEST, message) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> HttpRefusal:
    return HttpRefusal(413, "body_too_large", f"The body must be at most {max_bytes} bytes.")
