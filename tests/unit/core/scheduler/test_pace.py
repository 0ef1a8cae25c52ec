"""How much of a prompt fits beside streams."""

from __future__ import annotations

import pytest
from helpers.scheduling import make_decode, make_request, shape, standard, step

from baton.services.core.request import SampledToken
from baton.services.core.scheduler.decode import DecodeScheduler
from baton.services.core.scheduler.pace import STEP_SHARE, Handoffs, Pace

TARGET_S = 0.1


def pace() -> Pace:
    """A millisecond a token, and ten for a step."""
    return Pace(prefill_s_per_token=1e-3, decode_step_s=0.01)


def test_the_floor_of_a_step_is_not_taken_for_the_price_of_its_tokens() -> None:
    """Small chunks would look ever dearer, and become ever smaller."""
    learned = Pace(1e-3, 0.01)
    for num_decodes in (1, 2, 4, 8) * 20:
        learned.observe(0.01 + 0.001 * num_decodes, 0, num_decodes)
    assert learned.step_s(6) == pytest.approx(0.016, rel=0.1)
    for _ in range(100):
        learned.observe(0.01 + 20 * 1e-3, 20, 0)
    assert learned.prefill_s_per_token == pytest.approx(1e-3, rel=0.15)
    assert learned.tokens_beside(10, TARGET_S, 16) == pytest.approx(1e3 * (STEP_SHARE * TARGET_S - 0.02), abs=10)


def test_nobody_is_expected_before_a_handoff_was_announced() -> None:
    handoffs = Handoffs()
    handoffs.on_announced(None, 0.0)
    assert handoffs.budget(pace(), 0, 16, 0.0) is None


def test_the_strictest_that_came_lately_bounds_a_step_also_where_nobody_generates() -> None:
    handoffs = Handoffs()
    handoffs.on_announced(1.0, 0.0)
    handoffs.on_announced(TARGET_S, 1.0)
    assert handoffs.budget(pace(), 0, 16, 2.0) == pytest.approx(1e3 * (STEP_SHARE * TARGET_S - 0.01), abs=1)
    assert handoffs.budget(pace(), 0, 16, 60.0) is None, "long past"


def test_a_stream_that_waited_for_the_end_of_a_step_leaves_prompts_what_is_left_of_its_target() -> None:
    handoffs = Handoffs()
    handoffs.on_announced(TARGET_S, 0.0)
    whole = handoffs.budget(pace(), 1, 16, 0.0)
    handoffs.on_begun(TARGET_S, 1.0)
    left = handoffs.budget(pace(), 1, 16, 1.03)
    assert whole is not None
    assert left == pytest.approx(whole - 30, abs=1)
    assert handoffs.budget(pace(), 1, 16, 1.1) == whole, "only in its first step"


def test_prompts_never_miss_two_turns_in_a_row() -> None:
    handoffs = Handoffs()
    budgets = []
    for turn in range(4):
        handoffs.on_announced(TARGET_S, float(turn))
        handoffs.on_begun(TARGET_S, float(turn))
        budgets.append(handoffs.budget(pace(), 1, 16, turn + STEP_SHARE * TARGET_S))
    assert [budget == 0 for budget in budgets] == [True, False, True, False]


def hand_over(scheduler: DecodeScheduler, request_id: str, now: float, first_token: int) -> None:
    request = make_request(request_id, 4, max_tokens=20, first_token=first_token, service=standard(tpot_s=TARGET_S))
    names = scheduler._tables._namer.names(request.token_ids, 4)
    assert scheduler.reserve(request, names, now) is not None
    scheduler.commit(request_id, SampledToken(9), now)


def test_a_stream_that_is_handed_over_begins_in_a_step_without_prompts() -> None:
    scheduler = make_decode(max_num_batched_tokens=1000, max_model_len=512, num_blocks=400, pace=pace())
    scheduler.add(make_request("first", 200))
    assert shape(step(scheduler, 0.0)[0]) == {"first": 200}, "nobody has ever been handed over"
    scheduler.add(make_request("prompt", 200, first_token=300))
    hand_over(scheduler, "stream", 1.0, 1000)
    begins = shape(step(scheduler, 1.06)[0])
    assert begins == {"first": 1, "stream": 1}
    goes_on = shape(step(scheduler, 1.1)[0])
    assert goes_on["stream"] == 1
    assert 16 < goes_on["prompt"] < 100
