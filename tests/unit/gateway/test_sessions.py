"""Which conversation a request is a turn of and for how long, and the routes that ask workers about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from helpers.gateway_api import Gateway, make_gateway

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.sessions import SessionTag
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.session_calls import KeptBlocks, SessionCalls
from baton.services.gateway.tenant_files import ring_of_keys
from baton.services.runtime import grpc as runtime_grpc

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompts = {RESPONSES: {"input": "hi"}, ANTHROPIC: {"messages": MESSAGES, "max_tokens": 2}}
    return prompts.get(path, {"messages": MESSAGES, "max_tokens": 2}) | fields


@pytest.fixture
def gateway() -> Gateway:
    return make_gateway()


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway.client() as made:
        yield made


def marked(control: Any) -> dict[str, Any]:
    block = {"type": "text", "text": "hi", "cache_control": control}
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("path", "fields", "ttl_s"),
    [
        (CHAT, {}, 300.0),
        (CHAT, {"session_ttl_s": 7.5}, 7.5),
        (CHAT, {"prompt_cache_retention": "in_memory"}, 300.0),
        (CHAT, {"prompt_cache_retention": "24h"}, 86400.0),
        (CHAT, {"prompt_cache_retention": "24h", "session_ttl_s": 9}, 9.0),
        (RESPONSES, {"prompt_cache_retention": "24h"}, 86400.0),
        (RESPONSES, {"session_ttl_s": 20}, 20.0),
        (ANTHROPIC, {}, 300.0),
        (ANTHROPIC, {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, 3600.0),
        (ANTHROPIC, marked({"type": "ephemeral", "ttl": "1h"}), 3600.0),
        (ANTHROPIC, marked({"type": "ephemeral"}) | {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, 3600.0),
        (ANTHROPIC, marked({"type": "ephemeral", "ttl": "1h"}) | {"session_ttl_s": 30}, 30.0),
    ],
)
async def test_how_long_blocks_are_kept(
    client: httpx.AsyncClient, gateway: Gateway, path: str, fields: dict[str, Any], ttl_s: float
) -> None:
    response = await client.post(path, json=body(path, session_id="s", **fields))
    assert response.status_code == 200, response.text
    assert gateway.dispatcher.requests[0].session == SessionTag("/s", ttl_s)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, ANTHROPIC])
async def test_the_header_names_it_unless_the_body_does(client: httpx.AsyncClient, gateway: Gateway, path: str) -> None:
    await client.post(path, json=body(path), headers={"x-session-id": "from-header"})
    await client.post(path, json=body(path, session_id="from-body"), headers={"x-session-id": "from-header"})
    await client.post(path, json=body(path, session_ttl_s=9))  # of no conversation
    keys = [request.session and request.session.key for request in gateway.dispatcher.requests]
    assert keys == ["/from-header", "/from-body", None]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"session_ttl_s": 0}, "session_ttl_s"),
        (CHAT, {"session_ttl_s": 86401}, "session_ttl_s"),
        (CHAT, {"prompt_cache_retention": "forever"}, "prompt_cache_retention"),
        (ANTHROPIC, {"cache_control": {"type": "eternal"}}, "cache_control.type"),
        (ANTHROPIC, marked({"type": "ephemeral", "ttl": "2h"}), "messages[0].content[0].cache_control.ttl"),
        (ANTHROPIC, marked("ephemeral"), "messages[0].content[0].cache_control.type"),
        (ANTHROPIC, {"session_ttl_s": -1}, "session_ttl_s"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body(path, **fields))
    assert response.status_code == 400
    assert param in response.text


async def test_a_header_that_is_too_long(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=body(CHAT), headers={"x-session-id": "s" * 129})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-session-id"


class Workers:
    """What workers know, as the routes ask for it."""

    def __init__(self) -> None:
        self.known: dict[str, list[KeptBlocks]] = {}

    async def get(self, key: str) -> list[KeptBlocks]:
        return self.known.get(key, [])

    async def close(self, key: str) -> bool:
        return self.known.pop(key, None) is not None


async def test_a_tenant_sees_and_closes_its_own_sessions_only() -> None:
    workers, ring = Workers(), ring_of_keys(["one", "two"])
    gateway = make_gateway(sessions=workers, authenticator=Authenticator(ring=ring))
    tenant = Authenticator(ring=ring).tenant("Bearer one")
    workers.known[f"{tenant.tenant_id}/a/b"] = [KeptBlocks("p-0", 3, 96, 5.0), KeptBlocks("d-0", 4, 128, 7.25)]
    async with gateway.client() as client:

        async def ask(method: str, key: str, session_id: str = "a/b") -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return await client.request(method, f"/v1/sessions/{session_id}", headers=headers)

        assert (await ask("GET", "two")).status_code == (await ask("DELETE", "two")).status_code == 404
        assert (await ask("GET", "three")).status_code == 401
        assert (await ask("GET", "one")).json() == {
            "id": "a/b",
            "object": "session",
            "blocks": 7,
            "bytes": 224,
            "expires_in_s": 7.25,
            "workers": [
                {"id": "p-0", "blocks": 3, "bytes": 96, "expires_in_s": 5.0},
                {"id": "d-0", "blocks": 4, "bytes": 128, "expires_in_s": 7.25},
            ],
        }
        first, again = await ask("DELETE", "one"), await ask("DELETE", "one")
        assert (first.status_code, first.content, again.status_code) == (204, b"", 404)
        assert (await ask("GET", "one")).status_code == 404
        assert (await ask("GET", "one", "s" * 129)).status_code == 404


class KnowingWorker(worker_pb2_grpc.WorkerServiceServicer):
    """A worker that knows some conversations."""

    def __init__(self, *keys: str) -> None:
        self.keys = set(keys)

    async def GetSession(self, request: Any, context: Any) -> worker_pb2.GetSessionResponse:
        if request.key not in self.keys:
            return worker_pb2.GetSessionResponse()
        return worker_pb2.GetSessionResponse(is_known=True, num_blocks=2, num_bytes=64, expires_in_s=3.0)

    async def CloseSession(self, request: Any, context: Any) -> worker_pb2.CloseSessionResponse:
        was_known = request.key in self.keys
        self.keys.discard(request.key)
        return worker_pb2.CloseSessionResponse(was_known=was_known)


class Registered:
    """Workers on ports of their own, in place of a registry."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._stack = AsyncExitStack()

    def __iter__(self) -> Any:
        return iter(self._workers)

    async def __aenter__(self) -> Registered:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def add(self, servicer: KnowingWorker | None) -> None:
        """None: a worker of a release without sessions."""
        server = runtime_grpc.create_server()
        if servicer is not None:
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        port = runtime_grpc.bind_server(server, "127.0.0.1", 0)
        await server.start()
        self._stack.push_async_callback(server.stop, None)
        self.add_address(f"127.0.0.1:{port}")

    def add_address(self, address: str, *, is_connected: bool = True) -> None:
        link = SimpleNamespace(worker_id=f"w-{len(self._workers)}", address=address, is_connected=is_connected)
        self._workers.append(SimpleNamespace(link=link))


@pytest.fixture
async def registered() -> AsyncIterator[Registered]:
    async with Registered() as made:
        yield made


async def test_all_workers_are_asked_and_told(registered: Registered) -> None:
    first, second = KnowingWorker("t/a", "t/b"), KnowingWorker("t/a")
    for servicer in (first, None, second):
        await registered.add(servicer)
    calls = SessionCalls(registered)  # type: ignore[arg-type]
    assert await calls.get("t/a") == [KeptBlocks("w-0", 2, 64, 3.0), KeptBlocks("w-2", 2, 64, 3.0)]
    assert await calls.get("t/c") == []
    assert [await calls.close("t/a") for _ in range(2)] == [True, False]
    assert (first.keys, second.keys) == ({"t/b"}, set())


async def test_what_is_kept_is_told_although_a_worker_does_not_answer(registered: Registered) -> None:
    await registered.add(KnowingWorker("t/a"))
    registered.add_address("127.0.0.1:1")
    registered.add_address("127.0.0.1:1", is_connected=False)
    calls = SessionCalls(registered)  # type: ignore[arg-type]
    assert len(await calls.get("t/a")) == 1
    with pytest.raises(BatonError, match="w-1"):
        await calls.get("t/b")


@pytest.mark.parametrize("is_connected", [True, False])
async def test_a_conversation_is_over_when_every_worker_has_heard_it(
    registered: Registered, is_connected: bool
) -> None:
    first, second = KnowingWorker("t/a"), KnowingWorker("t/a")
    await registered.add(first)
    registered.add_address("127.0.0.1:1", is_connected=is_connected)
    calls = SessionCalls(registered)  # type: ignore[arg-type]
    with pytest.raises(BatonError, match="w-1") as caught:
        await calls.close("t/a")
    assert (caught.value.code, caught.value.retry_after_s) == (ErrorCode.WORKER_LOST, 1.0)
    assert first.keys == set()  # whoever heard it has let go
    registered._workers.pop()
    await registered.add(second)  # it is there again
    assert [await calls.close("t/a") for _ in range(2)] == [True, False]
    assert second.keys == set()
