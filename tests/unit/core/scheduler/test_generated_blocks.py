"""Generated tokens' blocks: named over prompt and answer, so that a conversation's next turn finds all of them."""

from __future__ import annotations

import pytest
from helpers.scheduling import NAMER, make_decode, make_request, run_until_idle, step

from baton.services.core.block_state import Hold, Owner
from baton.services.core.request import Request


@pytest.mark.parametrize("end", ["length", "stop", "abort", "failed step", "preempted"])
def test_blocks_of_generated_tokens_are_named_like_a_prompts_however_the_request_ends(end: str) -> None:
    """The next turn's prompt is this prompt and this answer: all their full blocks are found."""
    decode = make_decode()
    request = make_request("r", 6, max_tokens=9 if end == "length" else 40, stop_token_ids=frozenset({2000}))
    decode.add(request)
    answer = iter(range(1000, 1008))

    def draw(request: Request) -> int:
        return next(answer, 2000 if end == "stop" else 1008)

    for _ in range(9):
        step(decode, token_of=draw)
    if end == "abort":
        decode.abort("r")
    elif end == "failed step":
        decode.schedule(0.0)  # raises in the engine, so that there is no update
        decode.abort("r")
    elif end == "preempted":
        decode._preempt(decode._sequences["r"])
    conversation = [*range(6), *range(1000, 1008)]
    assert request.token_ids[:14] == conversation
    names = NAMER.names(conversation, 4)[:3]
    assert len(decode.pool.lookup(names)) == 3  # of 14 computed tokens
    assert set(names) <= set(decode.pool.take_events().stored)
    following = make_request("next", 1)
    following.token_ids[:] = [*conversation, 7, 8, 9]
    following.num_prompt_tokens = len(following.token_ids)
    decode.abort("r")
    decode.add(following)
    output, _ = step(decode)
    assert following.num_cached_tokens == 12
    assert output.num_tokens == 5


def test_generated_blocks_are_forgotten_from_the_end_of_the_conversation() -> None:
    decode = make_decode(num_blocks=6)
    decode.add(make_request("r", 8, max_tokens=9))
    run_until_idle(decode)
    names = NAMER.names([*range(8), *[1000] * 8], 4)[:4]
    assert len(decode.pool.lookup(names)) == 4
    hold = Hold(Owner.REQUEST, "other")
    for length in (3, 2, 1):
        decode.pool.allocate(decode.pool.num_available - length, hold)
        assert len(decode.pool.lookup(names)) == length
