"""G. Conversations."""

from __future__ import annotations

import dataclasses
import random
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conformance.conftest import Owned
from helpers.api_client import Api
from helpers.gateway_replica import Replica
from helpers.waiting import eventually_sync

BLOCK = 16


def cached(answer: dict[str, Any]) -> int:
    details = answer["usage"].get("prompt_tokens_details")
    if details is None:
        pytest.skip("the server does not tell cached tokens")
    return int(details["cached_tokens"])


def first_turn(api: Api, salt: str) -> tuple[list[dict[str, Any]], int] | None:
    """A question and its answer; and how many tokens of the next prompt had their KV computed by then.

    None where the answer's text has other tokens than the model said: the next prompt is made from text.
    """
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": f"{salt}: " + "tell me about the fox and the key. " * 6}
    ]
    answer = api.chat(
        messages=messages, max_tokens=40, min_tokens=40, temperature=0.9, seed=3, cache_salt=salt, return_token_ids=True
    )
    content = answer["choices"][0]["message"]["content"]
    if api.tokenize(content) != answer["choices"][0]["token_ids"]:
        return None
    messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "And then?"}]
    # The last token was sampled and never computed.
    return messages, answer["usage"]["prompt_tokens"] + 39


def check_next_turn(api: Api, second: Api) -> None:
    """A conversation whose second turn goes through ``second`` finds the blocks of the first, answer included.

    Where nothing was found, another conversation is tried: a gateway hears of a worker's new blocks a moment later.
    """
    found: list[tuple[int, int]] = []

    def is_found() -> bool:
        salt = uuid.uuid4().hex
        turn = first_turn(api, salt)
        if turn is None:
            return False
        messages, num_known = turn
        found.append((cached(second.chat(messages=messages, max_tokens=1, cache_salt=salt)), num_known))
        return found[-1][0] >= num_known // BLOCK * BLOCK

    eventually_sync(is_found, timeout_s=60.0, what=f"a turn that reuses all full blocks: {found}")


def test_b096_the_next_turn_reuses_prompt_and_answer(api: Api) -> None:
    check_next_turn(api, api)


def test_b097_also_through_another_gateway(replica: Replica, owned: Owned, api: Api) -> None:
    check_next_turn(api, dataclasses.replace(api, url=replica.url))


# Conversations that are prompts of token ids: the first blocks of one are what its next turn finds. Two tokens are asked for,
# since an answer of one is not handed over.
VOCABULARY = range(300, 2000)


def tokens(num_blocks: int) -> list[int]:
    """A prompt that nobody has sent before."""
    return random.choices(VOCABULARY, k=num_blocks * BLOCK)


def hits(api: Api, prompt: list[int], num_blocks: int, **fields: Any) -> int:
    """How many of the first blocks of a prompt the server finds. Asking leaves them where they were last used: now."""
    answer = api.complete(prompt=[*prompt[: num_blocks * BLOCK], VOCABULARY[0]], max_tokens=2, **fields)
    return cached(answer) // BLOCK


def flood(api: Api, owned: Owned, *, times: float = 1.5) -> None:
    """Prompts of nobody's, more than all pools together hold; each is served."""
    num_blocks = sum(worker["kv_blocks"]["total"] for worker in owned.serving.workers())
    size = 60
    with ThreadPoolExecutor(4) as threads:
        prompts = [tokens(size) for _ in range(int(num_blocks * times / size))]
        for answer in threads.map(lambda prompt: api.complete(prompt=prompt, max_tokens=2), prompts):
            assert answer["usage"]["prompt_tokens"] == size * BLOCK


def name() -> str:
    return f"s/{uuid.uuid4().hex}"


def session(api: Api, session_id: str, method: str = "GET") -> int:
    return api.http.request(method, f"{api.url}/v1/sessions/{session_id}", headers=api.headers).status_code


def test_b098_a_session_keeps_its_blocks_under_a_flood(api: Api, owned: Owned) -> None:
    kept, by_header, lost = tokens(12), tokens(12), tokens(12)
    api.complete(prompt=kept, max_tokens=2, session_id=name())
    body = api.body("/v1/completions", prompt=by_header, max_tokens=2)
    assert api.post("/v1/completions", body, x_session_id=name()).status_code == 200
    api.complete(prompt=lost, max_tokens=2)
    flood(api, owned)
    assert hits(api, kept, 12) == 12
    assert hits(api, by_header, 12) == 12
    assert hits(api, lost, 12) == 0


def test_b099_a_session_that_is_closed_makes_room_first(api: Api, owned: Owned, replica: Replica) -> None:
    flood(api, owned)  # so that no block is free any more
    shared, own, others = tokens(6), tokens(6), tokens(6)
    closed, open_ = name(), name()
    api.complete(prompt=shared + others, max_tokens=2, session_id=open_)
    nobodys = tokens(6)
    api.complete(prompt=nobodys, max_tokens=2)
    api.complete(prompt=shared + own, max_tokens=2, session_id=closed)  # used last: it would go last
    assert session(api, closed) == session(api, open_) == 200
    stranger = dataclasses.replace(api, key=owned.other_key)
    assert session(stranger, closed) == session(stranger, closed, "DELETE") == 404
    elsewhere = dataclasses.replace(api, url=replica.url)
    assert session(elsewhere, closed) == 200
    assert [session(elsewhere, closed, "DELETE") for _ in range(2)] == [204, 404]
    assert session(api, closed) == 404
    assert session(api, open_) == 200
    api.complete(prompt=tokens(24), max_tokens=2)  # a little room is needed
    assert hits(api, shared + own, 12) == 6
    assert hits(api, nobodys, 6) == 6
    assert hits(api, shared + others, 12) == 12


def test_b100_when_its_time_is_over_a_session_keeps_nothing(api: Api, owned: Owned) -> None:
    short, long = tokens(12), tokens(12)
    over, lasting = name(), name()
    api.complete(prompt=short, max_tokens=2, session_id=over, session_ttl_s=1.0)
    api.complete(prompt=long, max_tokens=2, session_id=lasting, prompt_cache_retention="24h")
    eventually_sync(lambda: session(api, over) == 404, timeout_s=60.0, what="the end of a session's time")
    assert hits(api, short, 12) == 12  # nobody needed the room
    assert session(api, lasting) == 200
    flood(api, owned)
    assert hits(api, short, 12) == 0
    assert hits(api, long, 12) == 12


def retained(api: Api) -> dict[str, tuple[float, float]]:
    """What sessions keep on each worker and at most may keep, in bytes, as the metrics show it."""
    found: dict[str, list[float]] = {"": [], "_budget": []}
    lines = api.get("/metrics").text.splitlines()
    workers = [line.split('"')[1] for line in lines if line.startswith("baton_kv_retained_bytes{")]
    for suffix, values in found.items():
        values += [float(line.split()[-1]) for line in lines if line.startswith(f"baton_kv_retained_bytes{suffix}{{")]
    return dict(zip(workers, zip(found[""], found["_budget"], strict=True), strict=True))


def test_b101_what_sessions_keep_stays_inside_the_budget(api: Api, owned: Owned) -> None:
    workers = {worker["id"]: worker for worker in owned.serving.workers()}
    num_turns = int(1.2 * max(worker["kv_blocks"]["total"] for worker in workers.values()) / 60)
    with ThreadPoolExecutor(4) as threads:
        turns = [
            threads.submit(api.complete, prompt=tokens(60), max_tokens=2, session_id=name()) for _ in range(num_turns)
        ]
        readings = [retained(api) for turn in turns if turn.result()]
    eventually_sync(
        lambda: all(kept > 0.9 * budget for kept, budget in retained(api).values()),
        timeout_s=60.0,
        what="sessions that keep as much as they may",
    )
    readings.append(retained(api))
    for reading in readings:
        assert reading.keys() == workers.keys()
        assert all(0 <= kept <= budget for kept, budget in reading.values()), reading
    assert all(budget > 0 for _, budget in readings[-1].values())
    flood(api, owned, times=0.5)  # none of it is in the way
    assert all(kept <= budget for kept, budget in retained(api).values())


def test_b102_two_tenants_never_share(owned: Owned, api: Api) -> None:
    other = dataclasses.replace(api, key=owned.other_key)
    prompt = f"{uuid.uuid4()} " + "the fox went out to look for the key " * 8
    first, again = (api.complete(prompt=prompt, max_tokens=2) for _ in range(2))
    assert cached(first) == 0
    assert cached(again) > 0
    assert cached(other.complete(prompt=prompt, max_tokens=2)) == 0
    assert cached(other.complete(prompt=prompt, max_tokens=2)) == cached(again)
