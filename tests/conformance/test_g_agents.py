"""G. Conversations. What is not built yet is listed in the catalogue."""

from __future__ import annotations

import dataclasses
import uuid
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


def test_b102_two_tenants_never_share(owned: Owned, api: Api) -> None:
    other = dataclasses.replace(api, key=owned.other_key)
    prompt = f"{uuid.uuid4()} " + "the fox went out to look for the key " * 8
    first, again = (api.complete(prompt=prompt, max_tokens=2) for _ in range(2))
    assert cached(first) == 0
    assert cached(again) > 0
    assert cached(other.complete(prompt=prompt, max_tokens=2)) == 0
    assert cached(other.complete(prompt=prompt, max_tokens=2)) == cached(again)
