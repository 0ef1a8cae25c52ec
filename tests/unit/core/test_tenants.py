"""Limits of tenants: what is refused and until when, and that nothing is counted twice or forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.rate_limit import Bucket, Window
from baton.services.core.tenants import Tenant, TenantLedger, TenantLimits

DAY_S = 86400.0
NOW = 20_000 * DAY_S + 6 * 3600.0  # six in the morning


def tenant(name: str = "one", **limits: int) -> Tenant:
    return Tenant(name, name, limits=TenantLimits(**limits))


def refusal(ledger: TenantLedger, who: Tenant, now: float) -> BatonError:
    with pytest.raises(BatonError) as caught:
        ledger.enter(who, now)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    return caught.value


def enter_and_leave(ledger: TenantLedger, who: Tenant, now: float) -> None:
    ledger.enter(who, now)
    ledger.leave(who)


@given(
    capacity=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(-5, 100), st.integers(0, 300)), max_size=30),
)
def test_a_bucket_never_gives_more_than_it_holds_and_gets(capacity: int, steps: list[tuple[float, int]]) -> None:
    now, latest = 0.0, 0.0
    bucket = Bucket(capacity, 60.0, now)
    taken = 0
    for elapsed_s, amount in steps:
        now += elapsed_s
        latest = max(latest, now)
        if bucket.wait_s(amount, now) == 0 and amount <= capacity:
            bucket.take(amount, now)
            taken += amount
        assert bucket.level(now) <= capacity
    # A clock that goes back and forth may be counted from where it was set back, never more than its forward steps.
    forward_s = sum(max(0.0, elapsed_s) for elapsed_s, _ in steps)
    assert taken <= capacity * (1 + forward_s / 60.0) + 1e-6


@given(capacity=st.integers(1, 1000), taken=st.integers(0, 5000), least=st.integers(1, 1000))
def test_after_the_wait_of_a_bucket_it_is_there_and_not_before(capacity: int, taken: int, least: int) -> None:
    bucket = Bucket(capacity, 60.0, 0.0)
    bucket.take(taken, 0.0)
    wait_s = bucket.wait_s(least, 0.0)
    assert bucket.wait_s(least, wait_s * 0.99) > 0 or wait_s == 0
    assert bucket.wait_s(least, wait_s) == pytest.approx(0, abs=1e-6)


def test_a_bucket_of_another_size_remembers_what_was_used() -> None:
    bucket = Bucket(100, 60.0, 0.0)
    bucket.take(30, 0.0)
    bucket.resize(50, 0.0)
    assert bucket.level(0.0) == 20
    bucket.resize(500, 0.0)
    assert bucket.level(0.0) == 470


def test_a_window_begins_anew_and_a_clock_that_is_set_back_opens_none() -> None:
    window = Window(10, DAY_S)
    window.take(15, NOW)
    assert window.left(NOW) == -5
    assert window.left(NOW - 2 * DAY_S) == -5
    assert window.next_s(NOW) == 18 * 3600
    assert window.left(NOW + window.next_s(NOW)) == 10


def test_without_limits_everything_is_let_in() -> None:
    ledger, who = TenantLedger(), tenant()
    for _ in range(1000):
        ledger.enter(who, NOW)
        ledger.charge(who, 10**9, NOW)
    assert ledger.left(who, NOW) == {}


def test_requests_at_once() -> None:
    ledger, who = TenantLedger(), tenant(max_concurrent_requests=2)
    ledger.enter(who, NOW)
    ledger.enter(who, NOW)
    error = refusal(ledger, who, NOW)
    assert error.code is ErrorCode.RATE_LIMITED
    assert "at most 2 requests at once" in error.message
    ledger.leave(who)
    ledger.enter(who, NOW)


def test_requests_per_minute() -> None:
    ledger, who = TenantLedger(), tenant(requests_per_minute=60)
    for _ in range(60):
        enter_and_leave(ledger, who, NOW)
    error = refusal(ledger, who, NOW)
    assert (error.code, error.retry_after_s) == (ErrorCode.RATE_LIMITED, pytest.approx(1.0))
    enter_and_leave(ledger, who, NOW + 1.001)
    refusal(ledger, who, NOW + 1.001)


def test_a_refused_request_counts_for_no_limit() -> None:
    ledger, who = TenantLedger(), tenant(requests_per_minute=2, max_concurrent_requests=1)
    ledger.enter(who, NOW)
    for _ in range(10):
        refusal(ledger, who, NOW)
    assert ledger.left(who, NOW) == {"max_concurrent_requests": 0, "requests_per_minute": 1}


def test_tokens_per_minute_may_be_overdrawn_and_are_waited_for() -> None:
    """A prompt that is longer than a minute's worth goes through, once, and is made up for."""
    ledger, who = TenantLedger(), tenant(tokens_per_minute=600)
    enter_and_leave(ledger, who, NOW)
    ledger.charge(who, 1199, NOW)
    error = refusal(ledger, who, NOW)
    assert (error.code, error.retry_after_s) == (ErrorCode.RATE_LIMITED, pytest.approx(60.0))
    assert ledger.left(who, NOW) == {"tokens_per_minute": 0}
    enter_and_leave(ledger, who, NOW + 60.001)


def test_a_quota_per_day_ends_at_midnight() -> None:
    ledger, who = TenantLedger(), tenant(tokens_per_day=1000)
    enter_and_leave(ledger, who, NOW)
    ledger.charge(who, 1000, NOW)
    error = refusal(ledger, who, NOW)
    assert error.code is ErrorCode.QUOTA_EXCEEDED
    assert error.retry_after_s == pytest.approx(18 * 3600)
    enter_and_leave(ledger, who, NOW + 18 * 3600)


def test_tenants_do_not_count_for_each_other() -> None:
    ledger = TenantLedger()
    one, other = tenant("one", requests_per_minute=1), tenant("other", requests_per_minute=1)
    enter_and_leave(ledger, one, NOW)
    refusal(ledger, one, NOW)
    enter_and_leave(ledger, other, NOW)


def test_changed_limits_hold_at_once_and_what_was_used_counts_on() -> None:
    ledger, who = TenantLedger(), tenant(requests_per_minute=10, tokens_per_day=100)
    for _ in range(10):
        ledger.enter(who, NOW)
    ledger.charge(who, 100, NOW)
    more = replace(who, limits=TenantLimits(requests_per_minute=12, tokens_per_day=200))
    assert ledger.left(more, NOW) == {"requests_per_minute": 2, "tokens_per_day": 100}
    ledger.enter(more, NOW)
    ledger.leave(who)  # which was let in under the old limits
    assert ledger.left(tenant(), NOW) == {}


def test_tenants_that_are_gone_are_forgotten_when_nothing_of_them_runs() -> None:
    ledger, gone, busy = TenantLedger(), tenant("gone", requests_per_minute=1), tenant("busy", requests_per_minute=1)
    enter_and_leave(ledger, gone, NOW)
    ledger.enter(busy, NOW)
    ledger.keep_only([])
    assert ledger.left(gone, NOW) == {"requests_per_minute": 1}
    ledger.leave(busy)
    refusal(ledger, busy, NOW)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.integers(0, 50), st.floats(0, 30)), max_size=60))
def test_what_is_left_is_the_limit_less_what_was_taken(steps: list[tuple[str, bool, int, float]]) -> None:
    ledger, now = TenantLedger(), 0.0
    tenants = {name: tenant(name, max_concurrent_requests=3, tokens_per_day=500) for name in "ab"}
    inside, tokens = dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)
    for name, enters, num_tokens, elapsed_s in steps:
        now += elapsed_s
        who = tenants[name]
        if enters:
            may = inside[name] < 3 and tokens[name] < 500
            try:
                ledger.enter(who, now)
                assert may
                inside[name] += 1
            except BatonError:
                assert not may
        elif inside[name]:
            ledger.leave(who)
            inside[name] -= 1
        ledger.charge(who, num_tokens, now)
        tokens[name] += num_tokens
        left = {"max_concurrent_requests": 3 - inside[name], "tokens_per_day": max(0, 500 - tokens[name])}
        assert ledger.left(who, now) == left
