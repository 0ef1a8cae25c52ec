"""The outermost layer of the REST API: what is checked of every HTTP request before it is routed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.services.core.errors import BatonError
from baton.services.core.tenants import ANONYMOUS, Tenant
from baton.services.gateway.auth import OPEN_PATHS, Authenticator
from baton.services.gateway.deps import GatewayDeps, Refusal
from baton.services.gateway.errors import HttpRefusal, public_error
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.validation import invalid

GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_CHARS = 128

_HOST = re.compile(r"[A-Za-z0-9._\-]+(:\d{1,5})?|\[[0-9A-Fa-f:.%]+\](:\d{1,5})?")


def check_request_id(request_id: str) -> str:
    """The id, if it is 1 to 128 visible ASCII characters. Raises INVALID_REQUEST."""
    if not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS or not all("!" <= char <= "~" for char in request_id):
        raise invalid(REQUEST_ID_HEADER, f"must be 1 to {MAX_REQUEST_ID_CHARS} visible ASCII characters")
    return request_id


def new_request_id() -> str:
    """An id for a request that came without one."""
    return secrets.token_hex(16)


@contextmanager
def inside(deps: GatewayDeps, tenant: Tenant) -> Iterator[None]:
    """Held while a generation runs, from before its body is read. Raises what the door or the tenant's limits say."""
    with deps.door.enter():
        deps.tenants.enter(tenant, deps.wall_clock())
        try:
            with deps.admission.visiting():
                yield
        finally:
            deps.tenants.leave(tenant)


class Boundary:
    """ASGI middleware. Gives the request its id and time of arrival, checks its headers and its key, and lets it in.

    Sets ``request_id``, ``received_s``, ``tenant``, ``may_operate`` and ``whose`` in the scope's state: the tenant whose
    receipts may be seen, None for all. Sends the id back in every response, and with it what is left of the tenant's limits.
    """

    def __init__(self, app: ASGIApp, deps: GatewayDeps, operators: Authenticator | None = None) -> None:
        """``operators``: it is their listener, and these are its keys."""
        self._app = app
        self._deps = deps
        self._operators = operators

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["received_s"] = self._deps.clock()
        state["request_id"] = new_request_id()
        state["tenant"] = ANONYMOUS
        state["may_operate"] = False
        state["whose"] = ANONYMOUS.tenant_id
        is_generation = scope["path"] in GENERATION_PATHS and scope["method"] == "POST"

        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                own = [(REQUEST_ID_HEADER.encode(), state["request_id"].encode("ascii"))]
                if is_generation:
                    own += self._limit_headers(state["tenant"])
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            state["request_id"] = self._check(scope) or state["request_id"]
            self._authenticate(scope, state)
            with inside(self._deps, state["tenant"]) if is_generation else nullcontext():
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            if has_started:
                raise
            # The application answers a BatonError itself: this one came before it.
            if isinstance(error, BatonError) and is_generation:
                self._deps.on_refused(Refusal(state["request_id"], error.code, SloTarget()))
            await public_error(error).response(scope["path"])(scope, receive, send_with_id)

    def _check(self, scope: Scope) -> str | None:
        """The client's request id, if it sent one."""
        headers, limits = Headers(scope=scope), self._deps.limits
        num_bytes = sum(len(name) + len(value) for name, value in headers.raw)
        if num_bytes > limits.max_header_bytes or len(headers.raw) > limits.max_headers:
            most = f"{limits.max_headers} headers of {limits.max_header_bytes} bytes together"
            raise HttpRefusal(431, "headers_too_large", f"At most {most} are accepted.")
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (hosts and not _HOST.fullmatch(hosts[0])):
            raise invalid("host", "must be one host name or address, with or without a port")
        request_id = headers.get(REQUEST_ID_HEADER)
        return None if request_id is None else check_request_id(request_id)

    def _authenticate(self, scope: Scope, state: dict[str, object]) -> None:
        """Decided by the path that is routed: a URL put together from headers could say something else."""
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        headers = Headers(scope=scope)
        keys = self._operators or self._deps.authenticator
        tenant = keys.tenant(headers.get("authorization"), headers.get("x-api-key"))
        sees_all = self._operators is not None or tenant.is_admin
        state["tenant"] = tenant
        state["may_operate"] = sees_all or not keys.needs_key
        state["whose"] = None if sees_all else tenant.tenant_id

    def _limit_headers(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """As OpenAI's clients read them."""
        left = self._deps.tenants.left(tenant, self._deps.wall_clock())
        headers = []
        for kind, limit in (("requests", "requests_per_minute"), ("tokens", "tokens_per_minute")):
            if limit in left:
                most = getattr(tenant.limits, limit)
                headers.append((f"x-ratelimit-limit-{kind}".encode(), str(most).encode()))
                headers.append((f"x-ratelimit-remaining-{kind}".encode(), str(left[limit]).encode()))
        return headers
