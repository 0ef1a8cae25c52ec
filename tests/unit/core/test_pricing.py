"""What a prompt costs that a decode worker computes beside its streams."""

from __future__ import annotations

import pytest

from baton.services.core.candidates import Role, RoutedRequest, WorkerView
from baton.services.core.cost_model import WorkerCost
from baton.services.core.links import LinkMatrix
from baton.services.core.pricing import beside_streams, price_local
from baton.services.core.scheduler.pace import STEP_SHARE

# A prompt of 500 tokens takes 0.1 s alone, a step of a few streams 10 ms.
COST = WorkerCost(prefill_s_per_token=200e-6, decode_step_s=10e-3)


def worker(role: Role = Role.DECODE, running: int = 4, tightest_tpot_s: float | None = None) -> WorkerView:
    return WorkerView(
        "w", "inc-w", role, "h:1", "same", "host", running=running, cost=COST, tightest_tpot_s=tightest_tpot_s
    )


def request(tpot_target_s: float | None = None) -> RoutedRequest:
    return RoutedRequest("r", 500, 16, 65536, {}, tpot_target_s=tpot_target_s)


def price(decoder: WorkerView, tpot_target_s: float | None = None) -> tuple[float, int]:
    priced = price_local(request(tpot_target_s), decoder, [decoder], LinkMatrix(), 0.0)
    return priced.prefill_s, priced.num_misses


def test_without_targets_a_prompt_takes_its_own_time() -> None:
    assert price(worker()) == (pytest.approx(0.1), 0)
    assert price(worker(running=0, tightest_tpot_s=0.02)) == (pytest.approx(0.1), 0), "of streams that are over"


def test_the_stricter_the_streams_the_longer_a_prompt_takes_beside_them() -> None:
    """Of a step of 40 ms prompts have 30, of one of 20 they have 10."""
    assert price(worker(tightest_tpot_s=0.04 / STEP_SHARE)) == (pytest.approx(0.1 * 4 / 3), 0)
    assert price(worker(tightest_tpot_s=0.02 / STEP_SHARE)) == (pytest.approx(0.1 * 2), 0)


def test_where_a_step_has_no_room_for_a_block_the_streams_miss_their_target() -> None:
    slowness, num_disturbed = beside_streams(worker(tightest_tpot_s=0.012), 4, None)
    assert num_disturbed == 4
    assert slowness == pytest.approx(1.0 + 10e-3 / (16 * 200e-6))
    assert beside_streams(worker(running=0), 0, 0.012)[1] == 1, "the next one that is handed over would"
    assert beside_streams(worker(tightest_tpot_s=0.001), 4, None)[1] == 1, "they miss it anyway"


def test_a_decode_worker_keeps_room_for_the_next_handoff_and_a_colocated_one_need_not() -> None:
    assert price(worker(running=0), 0.02 / STEP_SHARE) == (pytest.approx(0.1 * 2), 0)
    assert price(worker(Role.COLOCATED, running=0), 0.02 / STEP_SHARE) == (pytest.approx(0.1), 0)
