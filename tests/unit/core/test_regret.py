"""Whether handing over paid, afterwards; and from which length on it would."""

from __future__ import annotations

import dataclasses

import pytest

from baton.services.core.links import LinkMatrix, PairKey, ProbeResult
from baton.services.core.regret import RegretBook, bucket_of
from baton.services.core.router import Mode, Placement, Role, RoutedRequest, WorkerView, route
from baton.services.core.threshold import handover_threshold

P0 = WorkerView("p0", "inc-p0", Role.PREFILL, "h:1", "same", "host")
D0 = WorkerView("d0", "inc-d0", Role.DECODE, "h:2", "same", "host")
REQUEST = RoutedRequest("r", 640, 16, 65536, {})


def test_buckets_are_named_by_their_upper_end() -> None:
    assert [bucket_of(num) for num in (1, 128, 129, 40_000)] == ["<=128", "<=128", "<=512", ">32768"]


def test_a_decision_is_compared_with_the_other_way() -> None:
    decision = route(REQUEST, [P0, D0])
    other = decision.other_way
    assert other is not None
    assert (decision.chosen.mode, other.mode) == (Mode.REMOTE, Mode.LOCAL)
    book = RegretBook()
    quick = book.on_first_token(640, decision, other.price_s / 2)
    assert quick.gain_s == pytest.approx(other.price_s / 2)
    assert quick.regret_s == 0.0
    slow = book.on_first_token(640, decision, other.price_s + 0.5)
    assert slow.regret_s == pytest.approx(0.5)
    (row,) = book.table()
    assert (row["prompt_tokens"], row["mode"], row["requests"], row["paid"]) == ("<=2048", "remote", 2, 0.5)
    assert row["regret_ms"] == pytest.approx(250.0)


def test_without_another_way_there_is_nothing_to_regret() -> None:
    decision = route(REQUEST, [D0])
    comparison = RegretBook().on_first_token(640, decision, 9.0)
    assert (comparison.gain_s, comparison.regret_s) == (None, None)


def test_predictions_of_the_other_way_are_corrected_by_how_such_predictions_turned_out() -> None:
    book = RegretBook()
    local = route(REQUEST, [P0, D0], Placement.LOCAL)
    for _ in range(200):
        book.on_first_token(640, local, 3 * local.chosen.ttft_s)  # local takes three times what is promised
    remote = route(REQUEST, [P0, D0])
    assert remote.other_way is not None
    comparison = book.on_first_token(640, remote, 2 * remote.other_way.ttft_s)
    assert comparison.other_s == pytest.approx(3 * remote.other_way.ttft_s, rel=0.01)
    assert comparison.regret_s == 0.0


def test_the_threshold_is_where_the_prices_cross() -> None:
    links = LinkMatrix()
    links.on_probe(PairKey(P0.incarnation, D0.incarnation), ProbeResult("shm", True, 20.0, 4.0), 0.0)
    busy = dataclasses.replace(D0, running=2)
    threshold = handover_threshold([P0, busy], links, 0.0, block_size=16, block_bytes=65536)
    assert threshold is not None
    assert threshold > 1

    def mode(num_tokens: int) -> Mode:
        asked = dataclasses.replace(REQUEST, num_tokens=num_tokens)
        return route(asked, [P0, busy], Placement.AUTO, links).chosen.mode

    assert (mode(threshold - 1), mode(threshold)) == (Mode.LOCAL, Mode.REMOTE)


def test_an_idle_decode_worker_of_the_same_speed_needs_no_prefill_worker() -> None:
    assert handover_threshold([P0, D0], LinkMatrix(), 0.0, block_size=16, block_bytes=65536) is None
    assert handover_threshold([D0], LinkMatrix(), 0.0, block_size=16, block_bytes=65536) is None
    assert handover_threshold([P0], LinkMatrix(), 0.0, block_size=16, block_bytes=65536) is None


def test_auto_disturbs_streams_that_have_time_and_spares_those_that_have_not() -> None:
    """The same prompt, the same two workers: what the strictest stream there was promised decides."""
    patient = dataclasses.replace(D0, running=8, tightest_tpot_s=0.250)
    strict = dataclasses.replace(D0, running=8, tightest_tpot_s=0.0105)
    queued = dataclasses.replace(P0, queued_tokens=500)
    assert route(REQUEST, [queued, patient], Placement.AUTO).chosen.mode is Mode.LOCAL
    assert route(REQUEST, [queued, strict], Placement.AUTO).chosen.mode is Mode.REMOTE


def test_the_cheapest_that_meets_the_targets_comes_before_a_cheaper_one_that_does_not() -> None:
    busy = dataclasses.replace(D0, running=8)
    far = dataclasses.replace(P0, queued_tokens=1000)
    cheaper = route(REQUEST, [far, busy], Placement.AUTO).chosen
    assert cheaper.mode is Mode.REMOTE
    in_a_hurry = dataclasses.replace(REQUEST, ttft_target_s=0.2)
    chosen = route(in_a_hurry, [far, busy], Placement.AUTO).chosen
    assert (chosen.mode, chosen.num_misses) == (Mode.LOCAL, 0)
    assert cheaper.ttft_s > 0.2
