"""Fetching a prompt's blocks against computing them: the price, the holder, and how long to wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from baton.services.core.cost_model import LinkCost, WorkerCost
from baton.services.core.fetch import ROUND_TRIPS_S, FetchMode, FetchPlan, FetchPolicy, plan_fetch
from baton.services.core.links import LinkMatrix, PairKey
from baton.services.core.router import Mode, Placement, Role, RoutedRequest, WorkerView, route

FAST = LinkCost(fixed_s=1e-3, bytes_per_s=1e9)
SLOW = LinkCost(fixed_s=1e-3, bytes_per_s=1e6)
LINKS = {"d0": FAST, "d1": FAST, "p0": FAST}


def plan(cached: Mapping[str, int], mode: FetchMode = FetchMode.AUTO, **changes: Any) -> FetchPlan | None:
    """For a prompt of 40 blocks and a token, on p0."""
    links = changes.pop("links", LINKS)
    sizes = {"num_tokens": 641, "block_size": 16, "block_bytes": 65536, "prefill_s_per_token": 200e-6, **changes}
    return plan_fetch(FetchPolicy(mode, 2.0), "p0", links, cached, **sizes)


def test_what_another_holds_is_fetched_when_that_is_faster() -> None:
    found = plan({"d0": 30, "p0": 10})
    assert found is not None
    assert (found.holder_id, found.num_blocks, found.num_new) == ("d0", 30, 20)
    assert found.compute_s == pytest.approx(20 * 16 * 200e-6)
    assert found.fetch_s == pytest.approx(ROUND_TRIPS_S + 1e-3 + 20 * 65536 / 1e9)
    assert found.patience_s == pytest.approx(2.0 + found.compute_s)


@pytest.mark.parametrize(
    "why",
    [
        {"links": {"d0": SLOW}},  # a byte takes longer to come than to compute
        {"prefill_s_per_token": 1e-6},
        {"block_bytes": 1 << 30},
        {"num_tokens": 17},  # one block: the round trips take longer
    ],
)
def test_what_is_computed_as_fast_is_computed(why: dict[str, Any]) -> None:
    assert plan({"d0": 30}, **why) is None
    assert plan({"d0": 30}, FetchMode.ALWAYS, **why) is not None


@pytest.mark.parametrize("mode", FetchMode)
@pytest.mark.parametrize(
    "cached",
    [{}, {"p0": 30}, {"p0": 30, "d0": 30}, {"p0": 30, "d0": 29}, {"gone": 40}, {"p0": 40, "d0": 41}],
    ids=["nobody", "only itself", "as much", "less", "not to be asked", "all that is of use"],
)
def test_nobody_is_asked_who_has_no_more(cached: dict[str, int], mode: FetchMode) -> None:
    assert plan(cached, mode) is None


def test_switched_off_nothing_is_fetched() -> None:
    assert plan({"d0": 40}, FetchMode.OFF) is None


@pytest.mark.parametrize("num_tokens", [640, 641, 656])
def test_the_last_token_is_computed_in_any_case(num_tokens: int) -> None:
    found = plan({"d0": 41}, num_tokens=num_tokens)  # the index counts a partly filled last block as well
    assert found is not None
    assert found.num_blocks == (num_tokens - 1) // 16


def test_the_holder_that_saves_most_is_asked() -> None:
    assert plan({"d0": 20, "d1": 30}).holder_id == "d1"  # type: ignore[union-attr]
    assert plan({"d0": 30, "d1": 30}).holder_id == "d0"  # type: ignore[union-attr]
    found = plan({"d0": 20, "d1": 21}, links={"d0": FAST, "d1": LinkCost(1e-3, 1e8)})
    assert found is not None
    assert found.holder_id == "d0"  # one block more is not worth a link ten times as slow


def test_what_a_fetch_takes_besides_its_bytes_is_learned_within_bounds() -> None:
    found = plan({"d0": 30})
    assert found is not None
    policy = FetchPolicy()
    assert policy.learned(found, found.fetch_s) == policy
    slower = policy.learned(found, found.fetch_s + 0.01)
    assert slower.round_trips_s == pytest.approx(ROUND_TRIPS_S + 0.002)
    for _ in range(100):
        slower = slower.learned(found, 9.0)
    assert slower.round_trips_s == 0.05
    for _ in range(100):
        slower = slower.learned(found, 0.0)
    assert slower.round_trips_s == 0.001
    assert (
        plan_fetch(
            dataclasses.replace(policy, round_trips_s=10.0),
            "p0",
            LINKS,
            {"d0": 30},
            num_tokens=641,
            block_size=16,
            block_bytes=65536,
            prefill_s_per_token=200e-6,
        )
        is None
    )


# In the router.

P0, P1 = (WorkerView(f"p{i}", f"inc-p{i}", Role.PREFILL, f"h:{i}", "same", "host") for i in range(2))
D0, D1 = (WorkerView(f"d{i}", f"inc-d{i}", Role.DECODE, f"h:1{i}", "same", "host") for i in range(2))


def routed(cached: Mapping[str, int], mode: FetchMode = FetchMode.AUTO, **changes: Any) -> RoutedRequest:
    made = RoutedRequest("r1", 641, 16, 65536, cached, fetch=FetchPolicy(mode))
    return dataclasses.replace(made, **changes)


def test_a_returning_conversation_is_prefilled_by_the_pool_from_the_decode_workers_blocks() -> None:
    chosen = route(routed({"d0": 40}), [P0, D0]).chosen
    assert chosen.mode is Mode.REMOTE
    assert chosen.fetch is not None
    assert chosen.fetch.holder_id == "d0"
    assert chosen.prefill_s == P0.cost.prefill_floor_s  # a token is left
    without = route(routed({"d0": 40}, FetchMode.OFF), [P0, D0]).chosen
    assert without.fetch is None
    assert without.ttft_s - chosen.ttft_s == pytest.approx(without.prefill_s - chosen.prefill_s - chosen.fetch.fetch_s)


def test_with_auto_placement_a_short_new_part_is_prefilled_where_the_blocks_are() -> None:
    chosen = route(routed({"d0": 40}), [P0, D0, D1], Placement.AUTO).chosen
    assert (chosen.mode, chosen.decode, chosen.fetch) == (Mode.LOCAL, D0, None)


def test_a_decode_worker_that_prefills_fetches_from_another() -> None:
    full = dataclasses.replace(D0, running=300)
    chosen = route(routed({"d0": 40}), [full, D1], Placement.LOCAL).chosen
    assert chosen.decode is D1
    assert chosen.fetch is not None
    assert chosen.fetch.holder_id == "d0"


def test_a_prefill_worker_fetches_from_another_that_is_busy() -> None:
    busy = dataclasses.replace(P0, queued_tokens=100_000)
    chosen = route(routed({"p0": 40}), [busy, P1, D0]).chosen
    assert chosen.prefill is P1
    assert chosen.fetch is not None
    assert chosen.fetch.holder_id == "p0"


def test_workers_whose_blocks_differ_and_those_to_avoid_are_not_asked() -> None:
    other = dataclasses.replace(D1, compatibility="other")
    assert route(routed({"d1": 40}), [P0, D0, other]).chosen.fetch is None
    assert route(routed({"d1": 40}, excluded=("inc-d1",)), [P0, D0, D1]).chosen.fetch is None


@pytest.mark.parametrize("cause", ["expired", "peer_lost"])
def test_a_way_by_which_a_fetch_has_just_failed_is_not_asked(cause: str) -> None:
    links, asked = LinkMatrix(), routed({"d1": 40})
    links.on_fetch_failed(PairKey("inc-d1", "inc-p0"), cause, 0.0)
    assert route(asked, [P0, D0, D1], links=links, now=1.0).chosen.fetch is None
    assert route(asked, [P1, D0, D1], links=links, now=1.0).chosen.fetch is not None
    assert route(asked, [P0, D0, D1], links=links, now=6.0).chosen.fetch is not None


def test_a_way_by_which_handoffs_fail_is_not_asked_either() -> None:
    links, asked = LinkMatrix(), routed({"p1": 40})
    for _ in range(3):
        links.on_failure(PairKey("inc-p1", "inc-d0"), 0.0)
    assert route(asked, [P1, D0], Placement.LOCAL, links, 1.0).chosen.fetch is None
    assert route(asked, [P1, D1], Placement.LOCAL, links, 1.0).chosen.fetch is not None


def test_a_fast_prefill_worker_computes() -> None:
    fast = dataclasses.replace(P0, cost=WorkerCost(prefill_s_per_token=1e-6))
    assert route(routed({"d0": 40}), [fast, D0]).chosen.fetch is None
