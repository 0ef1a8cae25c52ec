"""The door over HTTP: who is let in, who waits in front of the tokenizer, who is refused and how."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from helpers.gateway_api import Gateway, chat_body, completion_body, make_gateway
from helpers.waiting import eventually

from baton.services.core.admission import AdmissionControl, Visit
from baton.services.core.errors import ErrorCode
from baton.services.core.slo import SloClass
from baton.services.gateway.limits import Limits

CHAT = "/v1/chat/completions"


@contextmanager
def crowded(gateway: Gateway, *, first_token_s: float = 1.0, token_s: float = 0.05) -> Iterator[list[Visit]]:
    """Four streams run, each four times as slow as one alone, and four first tokens have taken four times as long as one."""
    control = gateway.deps.admission.control
    now_s = gateway.deps.clock() - 1e5
    for number in range(40):
        visits = [Visit(SloClass.STANDARD, 10, 1, None, None) for _ in range(1 + number % 4)]
        for visit in visits:
            control.arrive(visit, now_s)
        for index, visit in enumerate(visits):
            control.progress(visit, 1, now_s + first_token_s * (1 + index))
        now_s += first_token_s * len(visits)
        for tokens in (1, 21):
            for visit in visits:
                control.progress(visit, tokens, now_s)
            now_s += 20 * token_s * len(visits)
        for visit in visits:
            control.end(visit, now_s)
    visits = [Visit(SloClass.STANDARD, 10, 1, None, None) for _ in range(4)]
    for visit in visits:
        assert control.arrive(visit, gateway.deps.clock())
    for visit in visits:
        visit.tpot_s = 2.5 * token_s  # known only now: else the last of them would wait
    control._end_every_s = 2.0
    yield visits
    for visit in visits:
        gateway.deps.admission.leave(visit)


async def test_what_would_come_too_late_is_refused_with_the_time_to_come_back(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    with crowded(gateway):
        body = chat_body(slo={"class": "interactive", "ttft_ms": 2500})
        response = await client.post(CHAT, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        assert int(response.headers["retry-after"]) >= 2
        [refusal] = gateway.refusals
        assert (refusal.code, refusal.slo.slo_class) == (ErrorCode.OVERLOADED, "interactive")
        assert gateway.dispatcher.requests == []
        assert gateway.deps.door.num_inside == 0
    assert (await client.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize("slo", [{"class": "batch"}, {"ttft_ms": 60000, "tpot_ms": 60}, {}])
async def test_what_can_wait_waits_in_front_of_the_tokenizer(
    client: httpx.AsyncClient, gateway: Gateway, slo: dict[str, Any]
) -> None:
    control = gateway.deps.admission.control
    with crowded(gateway, first_token_s=0.1) as visits:
        waiting = asyncio.ensure_future(client.post(CHAT, json=chat_body(slo=slo)))
        await eventually(lambda: control.num_waiting == 1)
        assert gateway.dispatcher.requests == []
        for visit in visits[:3]:
            gateway.deps.admission.leave(visit)
        assert (await waiting).status_code == 200
    assert (control.num_waiting, control.num_streams, control.ahead_tokens) == (0, 0, 0)


@pytest.mark.parametrize(("patience_s", "status"), [(60.0, 200), (1.0, 503)])
async def test_who_asks_for_nothing_in_time_waits_and_is_refused_when_that_would_take_very_long(
    patience_s: float, status: int
) -> None:
    """A first token here is expected after some 6 s, more than the standard class promises."""
    gateway = make_gateway(limits=Limits(patience_s=patience_s))
    async with gateway.client() as client:
        with crowded(gateway, first_token_s=1.5) as visits:
            asking = asyncio.ensure_future(client.post(CHAT, json=chat_body()))
            await eventually(lambda: asking.done() or gateway.deps.admission.control.num_waiting == 1)
            assert asking.done() == (status == 503)
            for visit in visits:
                gateway.deps.admission.leave(visit)
            assert (await asking).status_code == status


async def test_a_client_that_goes_while_it_waits_is_forgotten(gateway: Gateway) -> None:
    control = gateway.deps.admission.control
    with crowded(gateway):
        async with gateway.server() as url, httpx.AsyncClient(base_url=url) as client:
            waiting = asyncio.ensure_future(client.post(CHAT, json=chat_body(slo={"class": "batch"})))
            await eventually(lambda: control.num_waiting == 1)
            waiting.cancel()
            await eventually(lambda: control.num_waiting == 0)
            await eventually(lambda: gateway.deps.door.num_inside == 0)
    assert control.num_streams == 0


async def test_whatever_comes_of_a_request_its_place_is_free_afterwards(
    client: httpx.AsyncClient, gateway: Gateway
) -> None:
    control = gateway.deps.admission.control
    bodies = [
        chat_body(n=3),
        chat_body(stream=True),
        completion_body(prompt=["a", "b"]),
        completion_body(prompt="word " * 2000),  # too long: refused behind the door
        completion_body(max_tokens=0, echo=True),
    ]
    for body in bodies:
        path = CHAT if "messages" in body else "/v1/completions"
        await client.post(path, json=body)
        assert (control.num_streams, control.ahead_tokens, control.num_waiting) == (0, 0, 0)


async def test_a_request_whose_time_is_over_while_it_waits_ends(gateway: Gateway) -> None:
    gateway.deps.limits = type(gateway.deps.limits)(request_timeout_s=0.05)
    with crowded(gateway):
        async with gateway.client() as client:
            response = await client.post(CHAT, json=chat_body(slo={"class": "batch"}))
            assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert gateway.deps.admission.control.num_waiting == 0


async def test_a_prompt_that_is_far_too_long_counts_as_what_would_be_computed_of_it(
    client: httpx.AsyncClient, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever comes while it is tokenised would be told to come back in an hour."""
    limit = gateway.deps.model.max_model_len
    seen: list[int] = []
    arrive = AdmissionControl.arrive

    def note(control: AdmissionControl, visit: Visit, now: float, *, others_tokens: int = 0) -> bool:
        seen.append(visit.num_tokens)
        return arrive(control, visit, now, others_tokens=others_tokens)

    monkeypatch.setattr(AdmissionControl, "arrive", note)
    for prompt in ("word " * 100_000, [1, 2, 3]):
        await client.post("/v1/completions", json=completion_body(prompt=prompt))
    too_long, short = seen
    assert limit <= too_long <= 2 * limit
    assert short < limit
