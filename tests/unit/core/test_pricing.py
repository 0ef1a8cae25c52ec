"""What a prompt costs that a decode worker computes beside its streams."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from baton.services.core.candidates import Answer, Candidate, Mode, Placement, Role, RoutedRequest, WorkerView
from baton.services.core.cost_model import DecodeCost, WorkerCost
from baton.services.core.links import LinkMatrix
from baton.services.core.pricing import beside_streams, may_answer, price_local, price_remote, price_whole
from baton.services.core.router import route
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


STEADY = WorkerCost(prefill_s_per_token=200e-6, decode_step_s=10e-3, decode=DecodeCost(9e-3, 1e-3))
SHORT = Answer(5, 5)


def prefiller(**fields: Any) -> WorkerView:
    fields = {"cost": STEADY, "answers_whole": True} | fields
    return WorkerView("p", "inc-p", Role.PREFILL, "h:2", "same", "host", **fields)


def decoder(**fields: Any) -> WorkerView:
    fields = {"cost": STEADY, "gets_handoffs": False} | fields
    return WorkerView("d", "inc-d", Role.DECODE, "h:1", "same", "host", **fields)


def asked(answer: Answer | None = SHORT, tpot_target_s: float | None = None, **fields: Any) -> RoutedRequest:
    return RoutedRequest("r", 500, 16, 1000, {}, tpot_target_s=tpot_target_s, answer=answer, **fields)


def remote(request: RoutedRequest, p: WorkerView, d: WorkerView) -> Candidate:
    return price_remote(request, p, d, [p, d], LinkMatrix(), 0.0)


def whole(request: RoutedRequest, p: WorkerView) -> Candidate:
    return price_whole(request, p, [p], LinkMatrix(), 0.0)


def test_a_handoff_costs_the_pause_between_its_first_two_tokens() -> None:
    slow = decoder(cost=dataclasses.replace(STEADY, gap_s=0.06), gets_handoffs=True)
    known = remote(asked(), prefiller(), slow)
    not_compared = remote(asked(None), prefiller(), slow)
    assert known.price_s - not_compared.price_s == pytest.approx(0.05)
    assert remote(asked(Answer(1, 1)), prefiller(), slow).price_s == not_compared.price_s, "of one token there is none"


def test_of_a_short_answer_the_pause_is_what_misses_the_target_and_of_a_long_one_it_is_not() -> None:
    """4 tokens behind the first: 60 ms and three times 10 ms are 22.5 ms a token; of 41 tokens 11 ms."""
    slow = decoder(cost=dataclasses.replace(STEADY, gap_s=0.06), gets_handoffs=True)
    assert remote(asked(SHORT, 0.022), prefiller(), slow).num_misses == 1
    assert remote(asked(SHORT, 0.023), prefiller(), slow).num_misses == 0
    assert remote(asked(Answer(41, 41), 0.012), prefiller(), slow).num_misses == 0
    assert remote(asked(Answer(1, 1), 0.001), prefiller(), slow).num_misses == 0, "one token has no time between tokens"
    assert remote(asked(None, 0.012), prefiller(), slow).num_misses == 0, "where that is not compared"


def test_before_anything_was_handed_over_a_step_and_the_transfer_are_expected() -> None:
    unknown = remote(asked(), prefiller(), decoder(gets_handoffs=True))
    assert unknown.interference_s == pytest.approx(unknown.transfer_s)


def test_an_answer_is_dear_for_the_steps_that_it_takes_from_prompts() -> None:
    priced = whole(asked(), prefiller())
    assert (priced.mode, priced.decode.worker_id, priced.prefill) == (Mode.COLOCATED, "p", None)
    assert (priced.ttft_s, priced.interference_s) == (pytest.approx(0.1), pytest.approx(4 * 10e-3))
    busy = whole(asked(), prefiller(queued_tokens=1000))
    assert (busy.queue_s, busy.interference_s) == (pytest.approx(0.2), pytest.approx(3 * 4 * 10e-3)), (
        "two of its size wait"
    )
    beside_another = whole(asked(), prefiller(running=1))
    assert beside_another.interference_s == pytest.approx(0.1 + 4 * 1e-3), "a stream waits, and its steps grow a little"


def test_a_strict_answer_slows_prompts_on_a_prefill_worker_those_that_are_handed_over_too() -> None:
    p = prefiller(running=1, tightest_tpot_s=0.02 / STEP_SHARE)
    request = asked(SHORT, 1.0)
    assert whole(request, p).prefill_s == pytest.approx(0.1 * 2)
    assert remote(request, p, decoder()).prefill_s == pytest.approx(0.1 * 2)
    assert remote(asked(None, 1.0), p, decoder()).prefill_s == pytest.approx(0.1)
    begun = prefiller(running=1)
    assert whole(asked(SHORT, 0.02 / STEP_SHARE), begun).prefill_s == pytest.approx(0.1 * 2), "as strict as this one"


def test_who_has_had_no_handoff_lately_is_not_slowed_by_the_next_and_would_be_by_a_first() -> None:
    target_s = 0.02 / STEP_SHARE
    quiet, busy = decoder(), decoder(gets_handoffs=True)
    local = {d.gets_handoffs: price_local(asked(SHORT, target_s), d, [d], LinkMatrix(), 0.0) for d in (quiet, busy)}
    assert local[False].prefill_s == pytest.approx(0.1)
    assert local[True].prefill_s == pytest.approx(0.2)
    first_s = remote(asked(SHORT, target_s), prefiller(), quiet).price_s
    assert first_s - remote(asked(SHORT, target_s), prefiller(), busy).price_s == pytest.approx(0.1)


def test_what_is_late_anyway_counts_as_one_miss() -> None:
    request = asked(SHORT, 0.001, ttft_target_s=0.01)
    assert whole(request, prefiller()).num_misses == 1


@pytest.mark.parametrize(
    ("answer", "fields", "may"),
    [
        (SHORT, {}, True),
        (None, {}, False),
        (SHORT, {"answers_whole": False}, False),
        (Answer(11, 11), {}, True),
        (Answer(12, 12), {}, False),  # longer than its prompt takes
        (Answer(5, 2000), {}, True),
        (Answer(5, 2000), {"available_blocks": 300}, False),  # more than half of them
        (SHORT, {"running": 3, "max_num_seqs": 8}, True),
        (SHORT, {"running": 4, "max_num_seqs": 8}, False),
        (SHORT, {"running": 0, "max_num_seqs": 1}, True),
    ],
)
def test_a_prefill_worker_keeps_room_and_time_for_prompts(
    answer: Answer | None, fields: dict[str, Any], may: bool
) -> None:
    p = prefiller(**fields)
    assert may_answer(asked(answer), p, p.running) is may


def test_a_short_answer_is_given_whole_where_the_decode_worker_is_busy_and_a_handoff_would_miss_its_target() -> None:
    p, d = prefiller(), decoder(cost=dataclasses.replace(STEADY, gap_s=0.06), queued_tokens=2000)
    decision = route(asked(SHORT, 0.02), [p, d], Placement.AUTO)
    assert decision.chosen.decode is p
    assert decision.chosen.workers == (p,)
    assert decision.reason.startswith("a prefill worker answers it whole")
    assert decision.other_way is not None
    assert decision.other_way.mode is Mode.REMOTE
    for placement in (Placement.REMOTE, Placement.LOCAL):
        assert route(asked(None, 0.02), [p, d], placement).chosen.decode is d
    without = route(asked(SHORT, 0.02, excluded=["inc-p"]), [p, d], Placement.AUTO)
    assert without.chosen.workers == (d,), "not where it failed before"
