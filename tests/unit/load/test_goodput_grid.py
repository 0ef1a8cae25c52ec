"""Goodput from what requests took."""

from __future__ import annotations

import pytest

from baton.load.bench_goodput import ADAPTIVE, FIXED, TRACES_VARIABLE, bench_goodput, options_of
from baton.load.goodput_grid import Pair, Point, Took, attainment, goodput

PAIR = Pair(1.0, 0.02)


def test_a_request_is_good_when_it_meets_both_targets() -> None:
    took = [Took(1.0, 0.02), Took(1.1, 0.01), Took(0.5, 0.021), Took(0.1, 0.0)]
    assert [request.meets(PAIR) for request in took] == [True, False, False, True]
    assert attainment(took, PAIR) == 0.5
    assert attainment([], PAIR) == 0.0


def test_what_was_refused_or_failed_is_a_miss_under_any_targets() -> None:
    assert not Took(None, None).meets(Pair(1e9, 1e9))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, 0.0),
        ({2.0: 0.89}, 0.0),
        ({2.0: 0.95}, 2.0),
        ({2.0: 1.0, 4.0: 0.8}, 3.0),
        ({4.0: 0.8, 2.0: 1.0}, 3.0),
        ({2.0: 1.0, 4.0: 0.9}, 4.0),
        ({2.0: 1.0, 4.0: 0.8, 6.0: 1.0}, 3.0),
        ({2.0: 0.8, 4.0: 1.0}, 0.0),
    ],
    ids=["none", "too fast", "the only one", "between", "in any order", "the last", "luck behind a crossing", "luck"],
)
def test_goodput_is_the_rate_where_one_in_ten_begins_to_miss(shares: dict[float, float], expected: float) -> None:
    assert goodput(shares) == pytest.approx(expected)


def test_a_policy_is_compared_with_the_best_of_others() -> None:
    point = Point(PAIR, {"colocated": 2.0, "remote": 4.0, "adaptive": 3.0})
    assert point.best(("colocated", "remote", "local")) == ("remote", 4.0)
    assert point.ratio("adaptive", ("colocated", "remote")) == pytest.approx(0.75)
    assert point.ratio("adaptive", ("colocated",)) == pytest.approx(1.5)


def test_where_nobody_serves_anything_there_is_no_ratio() -> None:
    point = Point(PAIR, {"colocated": 0.0, "adaptive": 0.0})
    assert point.ratio("adaptive", ("colocated",)) is None
    assert point.best(("never measured",)) == ("", 0.0)


def test_without_the_traces_the_section_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACES_VARIABLE, raising=False)
    (row,) = bench_goodput()
    assert row.value is None
    assert TRACES_VARIABLE in row.skipped


def test_policies_have_the_same_cores() -> None:
    for cores in (2, 4, 7):
        for policy in (*FIXED, ADAPTIVE):
            options = options_of(policy, cores)
            named = dict(zip(options[::2], options[1::2], strict=True))
            num_workers = int(named.get("--prefill", 0)) + int(named.get("--decode", 1))
            assert num_workers * int(named["--threads-per-worker"]) == cores, policy
