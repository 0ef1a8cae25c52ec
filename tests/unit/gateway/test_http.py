"""What holds for every HTTP request: keys, ids, headers, and the routes that only tell."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from helpers.gateway_api import Gateway, chat_body, completion_body, make_gateway

from baton.services.core.errors import BatonError, ConfigurationError, ErrorCode
from baton.services.core.tenants import Tenant
from baton.services.gateway.app import create_app
from baton.services.gateway.auth import OPEN_PATHS, Authenticator, tenant_salt
from baton.services.gateway.errors import public_error
from baton.services.gateway.generation import SloTarget
from baton.services.gateway.limits import Limits

KEYS = ("first-key", "second-key")
CHAT = "/v1/chat/completions"


def keyed_gateway(**changes: Any) -> Gateway:
    return make_gateway(authenticator=Authenticator(KEYS), **changes)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# Keys.


async def test_every_route_needs_a_key_but_the_open_ones() -> None:
    gateway = keyed_gateway()
    routes = {(method, route.path) for route in _api_routes(gateway) for method in route.methods}
    assert {path for _, path in routes} >= {"/", "/tokenize", "/v1/models", "/v1/workers", "/openapi.json", CHAT}
    async with gateway.client() as client:
        for method, path in routes:
            response = await client.request(method, re.sub(r"{.*?}", "x", path))
            if path in OPEN_PATHS:
                assert response.status_code == 200, path
            else:
                assert response.status_code == 401, path
                error = response.json()["error"]
                if path.startswith("/v1/messages"):  # Anthropic's own words
                    assert error["type"] == "authentication_error"
                else:
                    assert error["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
    assert not gateway.dispatcher.requests


def _api_routes(gateway: Gateway) -> list[APIRoute]:
    """Every route of the application, also of the routers in it. Anything else than API routes has no place there."""

    def collect(routes: Any) -> list[APIRoute]:
        found: list[APIRoute] = []
        for route in routes:
            inner = getattr(route, "original_router", None) or getattr(route, "router", None)
            if isinstance(route, APIRoute):
                found.append(route)
            else:
                assert inner is not None, f"{route} is not a route that asks for a key"
                found += collect(inner.routes)
        return found

    return collect(create_app(gateway.deps).routes)


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Bearer no", "Bearer first-keyy", "Bearer first-ke", "Basic first-key", "first-key", "Bearer é"],
)  # fmt: skip
async def test_wrong_keys(authorization: str) -> None:
    async with keyed_gateway().client() as client:
        headers = {"authorization": authorization.encode()}
        response = await client.post(CHAT, json=chat_body(), headers=headers)  # type: ignore[arg-type]
        assert response.status_code == 401
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("key", KEYS)
async def test_right_keys(key: str) -> None:
    async with keyed_gateway().client(headers=bearer(key)) as client:
        assert (await client.post(CHAT, json=chat_body())).status_code == 200
        assert (await client.get("/v1/models", headers={"authorization": f"bearer {key}"})).status_code == 200


async def test_a_key_may_come_in_its_own_header_and_authorization_goes_before_it() -> None:
    async with keyed_gateway().client() as client:
        assert (await client.get("/v1/models", headers={"x-api-key": KEYS[0]})).status_code == 200
        assert (await client.get("/v1/models", headers={"x-api-key": "no"})).status_code == 401
        assert (await client.get("/v1/models", headers=bearer("no") | {"x-api-key": KEYS[0]})).status_code == 401


async def test_what_does_not_exist_needs_a_key_as_well() -> None:
    async with keyed_gateway().client() as client:
        assert (await client.get("/v1/nothing")).status_code == 401
        assert (await client.get("/v1/nothing", headers=bearer(KEYS[0]))).status_code == 404
        assert (await client.options(CHAT)).status_code == 405


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("//v1/models", {}), ("/V1/models", {}), ("/v1/../v1/models", {}), ("/%76%31/models", {}), ("/v1/models/", {}),
        ("/health/../v1/models", {}), ("/v1/models?/health", {}), ("/v1/models;/health", {}),
        ("/v1/models", {"host": "x/v1/health?"}), ("/v1/models", {"host": "a b"}), ("/v1/models", {"host": "/health"}),
        ("/v1/models", {"x-forwarded-prefix": "/health", "x-original-url": "/health"}),
    ],
)  # fmt: skip
async def test_no_path_or_host_goes_around_the_key(path: str, headers: dict[str, str]) -> None:
    async with keyed_gateway().client() as client:
        response = await client.get(path, headers=headers)
        assert response.status_code in (307, 400, 401, 404)
        assert "max_model_len" not in response.text


async def test_a_key_is_a_tenant_and_a_tenant_has_its_own_cache() -> None:
    gateway = keyed_gateway()
    async with gateway.client() as client:
        for key in KEYS:
            for salt in (None, "a"):
                await client.post(CHAT, json=chat_body(cache_salt=salt), headers=bearer(key))
    salts = [request.cache_salt for request in gateway.dispatcher.requests]
    assert len(set(salts)) == 4
    assert not any(key in salt for key in KEYS for salt in salts)


def test_tenant_and_salt_cannot_be_mistaken_for_each_other() -> None:
    one, other = Tenant("", "one"), Tenant("ab", "other")
    assert tenant_salt(one, "ab/c") != tenant_salt(other, "c")
    assert tenant_salt(other, "") == tenant_salt(other, None)


@pytest.mark.parametrize("key", ["", "with space", "tab\t", "ü"])
def test_keys_that_no_header_can_carry_are_refused_at_start(key: str) -> None:
    with pytest.raises(ConfigurationError, match="visible ASCII"):
        Authenticator([key])


# Ids.


async def test_request_id_is_echoed_and_names_the_receipt(gateway: Gateway) -> None:
    gateway.receipts["job/7"] = {"id": "job/7", "outcome": "stop"}
    async with gateway.client() as client:
        response = await client.post(CHAT, json=chat_body(), headers={"x-request-id": "job/7"})
        assert response.headers["x-request-id"] == "job/7"
        assert response.json()["id"] == "chatcmpl-job/7"
        assert gateway.dispatcher.requests[0].receipt_id == "job/7"
        for name in ("job/7", "chatcmpl-job/7", "cmpl-job/7"):
            assert (await client.get(f"/v1/requests/{name}")).json()["outcome"] == "stop"
        assert (await client.get("/v1/requests/job/8")).status_code == 404
        assert (await client.get("/v1/requests/chatcmpl-job/8")).json()["error"]["code"] == "not_found"


async def test_every_response_has_an_id(client: httpx.AsyncClient, gateway: Gateway) -> None:
    first, second = await client.post(CHAT, json=chat_body()), await client.get("/v1/nothing")
    assert first.json()["id"] == "chatcmpl-" + first.headers["x-request-id"]
    assert second.headers["x-request-id"] != first.headers["x-request-id"]


async def test_two_requests_with_one_id_do_not_collide(client: httpx.AsyncClient, gateway: Gateway) -> None:
    for _ in range(2):
        await client.post(CHAT, json=chat_body(), headers={"x-request-id": "x" * 128})
    first, second = gateway.dispatcher.requests
    assert first.receipt_id == second.receipt_id
    assert first.request_id != second.request_id
    assert max(len(first.request_id), len(second.request_id)) <= 128


# Headers and limits.


async def test_slo_of_body_and_headers(client: httpx.AsyncClient, gateway: Gateway) -> None:
    headers = {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "20.5"}
    await client.post(CHAT, json=chat_body(), headers=headers)
    await client.post(CHAT, json=chat_body(slo={"class": "interactive", "ttft_ms": 99}), headers=headers)
    await client.post(CHAT, json=chat_body())
    assert [request.slo for request in gateway.dispatcher.requests] == [
        SloTarget("standard", 250.0, 20.5),
        SloTarget("interactive", 99.0, 20.5),
        SloTarget(),
    ]


async def test_oversized_headers(client: httpx.AsyncClient) -> None:
    for headers in ({"x": "y" * 40_000}, {f"x-{i}": "y" for i in range(200)}):
        response = await client.get("/health", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")


async def test_two_hosts_are_refused(client: httpx.AsyncClient) -> None:
    request = client.build_request("GET", "/health")
    request.headers = httpx.Headers([("host", "a"), ("host", "b")])
    assert (await client.send(request)).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "api.example.com", "my_host"])
async def test_ordinary_hosts(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/health", headers={"host": host})).status_code == 200


async def test_too_many_requests_at_once_are_refused_at_the_door() -> None:
    gateway = make_gateway(limits=Limits(max_concurrent_requests=1))
    async with gateway.client() as client:
        with gateway.deps.door.enter():
            response = await client.post(CHAT, json=chat_body())
            assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
            assert gateway.refusals[0].code is ErrorCode.OVERLOADED
            assert (await client.get("/v1/models")).status_code == 200
        for stream in (False, True):
            assert (await client.post(CHAT, json=chat_body(stream=stream))).status_code == 200
        assert gateway.deps.door.num_inside == 0


async def test_a_closed_door_says_that_the_server_is_draining(client: httpx.AsyncClient, gateway: Gateway) -> None:
    gateway.deps.door.close()
    response = await client.post("/v1/completions", json=completion_body())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")


async def test_an_unforeseen_failure_is_a_500_without_insides(gateway: Gateway, logs: list[Any]) -> None:
    def broken() -> list[dict[str, Any]]:
        raise RuntimeError("at 0x7f0011223344 in /srv/secret.py")

    gateway.deps.workers = broken
    async with gateway.client() as client:
        response = await client.get("/v1/workers")
    assert response.status_code == 500
    assert response.json() == {
        "error": {"message": "Internal error.", "type": "server_error", "param": None, "code": "internal_error"}
    }
    assert "secret.py" in str(logs[0]["exc_info"])


# Routes that tell.


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["tiny", "tiny-alias"]
    assert all(model["max_model_len"] == 512 and model["object"] == "model" for model in listed["data"])
    assert (await client.get("/v1/models/tiny-alias")).json() == listed["data"][1]
    missing = await client.get("/v1/models/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_ready_version_metrics_workers(gateway: Gateway) -> None:
    async with gateway.client() as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/version")).json()["version"]
        metrics = await client.get("/metrics")
        assert (metrics.text, metrics.headers["content-type"].split(";")[0]) == ("baton_up 1\n", "text/plain")
        assert (await client.get("/v1/workers")).json() == {"object": "list", "data": [{"id": "decode-0"}]}
        gateway.deps.ready = lambda: (False, "no decode worker is ready")
        response = await client.get("/ready")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "no decode worker is ready")
        index = (await client.get("/")).json()
        assert (index["ready"], index["reason"]) == (False, "no decode worker is ready")


async def test_openapi_describes_the_bodies(client: httpx.AsyncClient) -> None:
    page = (await client.get("/openapi.json")).json()
    body = page["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "temperature", "slo", "return_token_ids"} <= set(body["properties"])
    assert "$ref" not in str(body)


# Text and tokens.


@pytest.mark.parametrize("text", ["hello world", "Grüße 🙂\r\n", "<|im_end|> x", ""])
async def test_tokenize_and_back(client: httpx.AsyncClient, text: str) -> None:
    answer = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": text}


async def test_tokenize_counts_messages_as_a_generation_does(client: httpx.AsyncClient) -> None:
    messages = chat_body()["messages"]
    counted = (await client.post("/tokenize", json={"messages": messages})).json()
    answered = (await client.post(CHAT, json=chat_body())).json()
    assert counted["count"] == answered["usage"]["prompt_tokens"]
    assert counted["token_strs"] is None


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, {"prompt": 5}])
async def test_tokenize_takes_one_of_both(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    response = await client.post("/tokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_detokenize_refuses_ids_that_do_not_exist(client: httpx.AsyncClient) -> None:
    response = await client.post("/detokenize", json={"tokens": [1, 10**6]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tokens")


def test_a_quarantined_request_is_an_error_that_clients_do_not_try_again() -> None:
    public = public_error(BatonError(ErrorCode.QUARANTINED, "2 workers were lost"))
    response = public.response()
    assert (response.status_code, public.code) == (500, "request_quarantined")
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers


# Operators.


class Operations:
    """Workers as the routes call them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def blocks(self, worker_id: str, **query: Any) -> dict[str, Any]:
        self.calls.append((worker_id, query))
        if worker_id == "nobody":
            raise BatonError(ErrorCode.NOT_FOUND, "There is no worker 'nobody'.", param="worker_id")
        return {"object": "list", "worker": worker_id, "data": [], "next": None}

    async def drain(self, worker_id: str, timeout_s: float) -> dict[str, Any]:
        self.calls.append((worker_id, timeout_s))
        return {"id": worker_id, "state": "drained", "given_up": 0}


async def test_one_workers_blocks_can_be_listed_and_it_can_be_drained() -> None:
    operations = Operations()
    gateway = make_gateway(operations=operations)
    async with gateway.client() as client:
        page = await client.get("/v1/workers/decode-0/blocks?overdue=true&first=7&limit=50")
        assert (page.status_code, page.json()["worker"]) == (200, "decode-0")
        drained = await client.post("/v1/workers/decode-0/drain?timeout_s=2.5")
        assert drained.json() == {"id": "decode-0", "state": "drained", "given_up": 0}
        missing = await client.get("/v1/workers/nobody/blocks")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        for query in ("limit=0", "limit=10001", "first=-1", "overdue=perhaps"):
            refused = await client.get(f"/v1/workers/decode-0/blocks?{query}")
            assert refused.status_code in (400, 404, 422), query
            assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert operations.calls[0] == ("decode-0", {"overdue": True, "cached": False, "first": 7, "limit": 50})
    assert operations.calls[1] == ("decode-0", 2.5)


async def test_without_workers_there_is_nobody_to_ask() -> None:
    async with make_gateway().client() as client:
        assert (await client.get("/v1/workers/decode-0/blocks")).status_code == 404
        assert (await client.post("/v1/workers/decode-0/drain")).status_code == 404
