"""What is on which listener, and for whom: the public one, and the one for operators."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from helpers.gateway_api import make_gateway

from baton.services.core.router import Role
from baton.services.core.tenants import Tenant
from baton.services.gateway.app import create_admin_app, create_app
from baton.services.gateway.auth import OPEN_PATHS, Authenticator
from baton.services.gateway.tenant_files import key_digest

GENERATING = {
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "POST /v1/messages",
    "POST /v1/messages/count_tokens", "POST /v1/embeddings", "POST /tokenize", "POST /detokenize",
    *(f"{method} /v1/responses/{{response_id:path}}" for method in ("GET", "POST", "DELETE")),
    "GET /v1/sessions/{session_id:path}", "DELETE /v1/sessions/{session_id:path}",
}  # fmt: skip
TELLING = {
    "GET /", "GET /v1/models", "GET /v1/models/{name:path}", "GET /v1/workers", "GET /v1/requests/{request_id:path}",
    "GET /health", "GET /ping", "GET /ready", "GET /metrics", "GET /version", "GET /openapi.json",
}  # fmt: skip
OPERATING = {
    "GET /v1/decisions", "GET /v1/workers/{worker_id}/blocks",
    "POST /v1/workers/{worker_id}/drain", "POST /v1/workers/{worker_id}/role",
}  # fmt: skip
# What each of them needs beside its path.
QUERIES = {"/v1/workers/{worker_id}/role": "?role=prefill"}


def routes(app: FastAPI) -> set[str]:
    def collect(found: Any) -> set[str]:
        names: set[str] = set()
        for route in found:
            inner = getattr(route, "original_router", None) or getattr(route, "router", None)
            if isinstance(route, APIRoute):
                names |= {f"{method} {route.path}" for method in route.methods}
            else:
                names |= collect(inner.routes)  # type: ignore[union-attr]
        return names

    return collect(app.routes)


class Operations:
    """A worker that does everything."""

    async def blocks(self, worker_id: str, **query: Any) -> dict[str, Any]:
        return {"worker": worker_id, "data": [], "next": None}

    async def drain(self, worker_id: str, timeout_s: float) -> dict[str, Any]:
        return {"id": worker_id, "state": "drained", "given_up": 0}

    async def change_role(self, worker_id: str, role: Role, timeout_s: float) -> dict[str, Any]:
        return {"id": worker_id, "role": role.value, "state": "changed"}


DEPS = {"operations": Operations(), "decisions": lambda: {"threshold": None}}
RING = {key_digest("plain"): Tenant("a1", "plain"), key_digest("boss"): Tenant("b2", "boss", is_admin=True)}


async def statuses(app: FastAPI, names: set[str], **headers: str) -> set[int]:
    """Of all of these routes."""
    found = set()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        for name in names:
            method, path = name.split()
            url = re.sub(r"{.*?}", "x", path) + QUERIES.get(path, "")
            found.add((await client.request(method, url, headers=headers)).status_code)
    return found


def test_the_table_of_routes_is_this_one() -> None:
    """A new route has to be put on a plane on purpose."""
    deps = make_gateway().deps
    assert routes(create_app(deps)) == GENERATING | TELLING | OPERATING
    assert routes(create_app(deps, with_operators=False)) == GENERATING | TELLING
    assert routes(create_admin_app(deps, Authenticator())) == TELLING | OPERATING


async def test_without_keys_everything_is_open_as_on_a_laptop() -> None:
    app = create_app(make_gateway(**DEPS).deps)
    assert await statuses(app, OPERATING) == {200}


async def test_a_tenant_may_not_do_what_operators_do_and_one_that_is_marked_may() -> None:
    app = create_app(make_gateway(authenticator=Authenticator(ring=RING), **DEPS).deps)
    assert await statuses(app, OPERATING) == {401}
    assert await statuses(app, OPERATING, authorization="Bearer plain") == {403}
    assert await statuses(app, OPERATING, authorization="Bearer boss") == {200}
    assert await statuses(app, {"GET /v1/workers"}, authorization="Bearer plain") == {200}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        refused = await client.post("/v1/workers/x/drain", headers={"x-api-key": "plain"})
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
    assert "admin: true" in error["message"]


async def test_where_other_machines_reach_the_public_port_operators_are_not_served_there() -> None:
    app = create_app(make_gateway(authenticator=Authenticator(ring=RING), **DEPS).deps, with_operators=False)
    assert await statuses(app, OPERATING, authorization="Bearer boss") == {404}


async def test_the_admin_listener_has_keys_of_its_own_or_none() -> None:
    deps = make_gateway(authenticator=Authenticator(ring=RING), **DEPS).deps
    assert await statuses(create_admin_app(deps, Authenticator()), OPERATING | {"GET /v1/workers"}) == {200}
    app = create_admin_app(deps, Authenticator(["operator"]))
    closed = {name for name in TELLING | OPERATING if name.split()[1] not in OPEN_PATHS}
    assert await statuses(app, closed) == {401}
    assert await statuses(app, closed, authorization="Bearer boss") == {401}
    assert await statuses(app, OPERATING, authorization="Bearer operator") == {200}
    assert await statuses(app, {"POST /v1/chat/completions"}, authorization="Bearer operator") == {404}


async def test_a_page_in_a_browser_changes_nothing() -> None:
    changing = {name for name in OPERATING if name.startswith("POST")}
    for app in (create_app(make_gateway(**DEPS).deps), create_admin_app(make_gateway(**DEPS).deps, Authenticator())):
        assert await statuses(app, changing, origin="http://evil.example") == {403}


@pytest.mark.parametrize(("key", "whose"), [("plain", "a1"), ("boss", None)])
async def test_receipts_are_asked_for_in_the_name_of_the_tenant(key: str, whose: str | None) -> None:
    asked = []

    def receipt(receipt_id: str, of: str | None) -> dict[str, Any]:
        asked.append((receipt_id, of))
        return {"id": receipt_id}

    deps = make_gateway(authenticator=Authenticator(ring=RING), receipt=receipt).deps
    assert await statuses(create_app(deps), {"GET /v1/requests/r"}, authorization=f"Bearer {key}") == {200}
    assert await statuses(create_admin_app(deps, Authenticator()), {"GET /v1/requests/r"}) == {200}
    assert asked == [("r", whose), ("r", None)]
