"""What tenants with limits get over HTTP: 429s that say when to come again, and headers with what is left."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from helpers.gateway_api import Gateway, chat_body, completion_body, make_gateway

from baton.services.core.errors import ErrorCode
from baton.services.core.tenants import Tenant, TenantLimits
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.tenant_files import key_digest

CHAT = "/v1/chat/completions"


def limited(**limits: int) -> Gateway:
    ring = {
        key_digest("a"): Tenant("aa", "one", limits=TenantLimits(**limits)),
        key_digest("b"): Tenant("bb", "other"),
    }
    return make_gateway(authenticator=Authenticator(ring=ring), wall_clock=lambda: 1.7e9)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def check_refused(response: httpx.Response, code: str) -> None:
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, code)
    assert int(response.headers["retry-after"]) >= 1


async def test_requests_per_minute_and_what_is_left() -> None:
    gateway = limited(requests_per_minute=2, tokens_per_minute=1000)
    async with gateway.client() as client:
        for left in (1, 0):
            response = await client.post(CHAT, json=chat_body(), headers=bearer("a"))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == str(left)
            assert response.headers["x-ratelimit-limit-tokens"] == "1000"
        check_refused(await client.post(CHAT, json=chat_body(), headers=bearer("a")), "rate_limit_exceeded")
        assert [refusal.code for refusal in gateway.refusals] == [ErrorCode.RATE_LIMITED]
        response = await client.post(CHAT, json=chat_body(), headers=bearer("b"))
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]
        # Only generations count.
        assert (await client.get("/v1/models", headers=bearer("a"))).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_prompt_and_answer_are_counted(stream: bool) -> None:
    gateway = limited(tokens_per_day=10_000)
    async with gateway.client() as client:
        body = completion_body(prompt=["one two", "three"], n=2, max_tokens=4, ignore_eos=True, stream=stream)
        response = await client.post("/v1/completions", json=body, headers=bearer("a"))
        assert response.status_code == 200
        usage = await used(client, body)
        (tenant,) = {request.tenant for request in gateway.dispatcher.requests if request.tenant.name == "one"}
        left = gateway.deps.tenants.left(tenant, 1.7e9)
        assert left == {"tokens_per_day": 10_000 - usage}


async def used(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    """What the same request uses, by its own account."""
    answer = await client.post("/v1/completions", json={**body, "stream": False}, headers=bearer("b"))
    return int(answer.json()["usage"]["total_tokens"])


async def test_a_used_up_quota() -> None:
    gateway = limited(tokens_per_day=5)
    async with gateway.client() as client:
        assert (await client.post(CHAT, json=chat_body(), headers=bearer("a"))).status_code == 200
        response = await client.post(CHAT, json=chat_body(), headers=bearer("a"))
        check_refused(response, "insufficient_quota")
        assert "5 tokens per day" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 60


async def test_requests_at_once_are_given_back_however_they_end() -> None:
    """Whole, streamed, refused for their content, failed."""
    gateway = limited(max_concurrent_requests=1)
    async with gateway.client() as client:
        for body in (chat_body(), chat_body(stream=True), chat_body(max_tokens=-1)):
            await client.post(CHAT, json=body, headers=bearer("a"))
        gateway.dispatcher.script = lambda request: [RuntimeError("broken")]
        assert (await client.post(CHAT, json=chat_body(), headers=bearer("a"))).status_code == 500
        started, going_on = asyncio.Event(), asyncio.Event()

        def script(request: Any) -> Any:
            started.set()
            return [going_on, *gateway.dispatcher.speak(request)]

        gateway.dispatcher.script = script
        first = asyncio.create_task(client.post(CHAT, json=chat_body(), headers=bearer("a")))
        await started.wait()
        check_refused(await client.post(CHAT, json=chat_body(), headers=bearer("a")), "rate_limit_exceeded")
        going_on.set()
        assert (await first).status_code == 200
        assert (await client.post(CHAT, json=chat_body(), headers=bearer("a"))).status_code == 200


async def test_the_openai_client_knows_what_it_is() -> None:
    gateway = limited(requests_per_minute=1)
    async with gateway.server() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="a", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        await client.chat.completions.create(model="tiny", messages=messages)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="tiny", messages=messages)
        assert caught.value.code == "rate_limit_exceeded"
