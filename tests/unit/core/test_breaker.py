"""When a breaker opens, what it lets through, and that it never stays open for good."""

from __future__ import annotations

from baton.services.core.breaker import Breaker, BreakerLimits, BreakerState

LIMITS = BreakerLimits(max_failures=3, window_s=30.0, open_s=5.0, max_open_s=20.0, try_s=60.0)


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(LIMITS)
    for _ in range(3):
        breaker.on_failure(now)
    return breaker


def test_it_opens_at_so_many_failures_in_a_window() -> None:
    breaker = Breaker(LIMITS)
    for now in (0.0, 29.0):
        breaker.on_failure(now)
        assert breaker.allows(now)
    breaker.on_failure(30.0)  # the first is forgotten by now
    assert breaker.state(30.0) is BreakerState.CLOSED
    breaker.on_failure(31.0)
    assert breaker.state(31.0) is BreakerState.OPEN
    assert not breaker.allows(31.0)


def test_a_success_forgets_the_failures_before_it() -> None:
    breaker = Breaker(LIMITS)
    breaker.on_failure(0.0)
    breaker.on_failure(1.0)
    breaker.on_success(2.0)
    breaker.on_failure(3.0)
    breaker.on_failure(4.0)
    assert breaker.state(4.0) is BreakerState.CLOSED
    assert breaker.num_failures(4.0) == 2


def test_half_open_lets_exactly_one_try_through() -> None:
    breaker = opened()
    assert breaker.state(4.9) is BreakerState.OPEN
    assert breaker.state(5.0) is BreakerState.HALF_OPEN
    assert breaker.allows(5.0)
    breaker.on_try(5.0)
    assert not breaker.allows(5.1)
    breaker.on_success(6.0)
    assert breaker.state(6.0) is BreakerState.CLOSED
    assert breaker.num_failures(6.0) == 0


def test_each_failed_try_doubles_the_time_up_to_a_limit_and_a_success_ends_that() -> None:
    breaker, now = opened(), 5.0
    for open_s in (10.0, 20.0, 20.0):
        assert breaker.state(now) is BreakerState.HALF_OPEN
        breaker.on_try(now)
        breaker.on_failure(now)
        assert breaker.state(now + open_s - 0.1) is BreakerState.OPEN
        now += open_s
    breaker.on_success(now)
    for _ in range(3):
        breaker.on_failure(now)
    assert breaker.state(now + 5.0) is BreakerState.HALF_OPEN


def test_a_success_of_a_try_from_before_it_opened_does_not_close_it() -> None:
    breaker = opened()
    breaker.on_success(1.0)
    assert breaker.state(1.0) is BreakerState.OPEN


def test_a_try_that_says_nothing_makes_room_for_the_next() -> None:
    breaker = opened()
    breaker.on_try(5.0)
    breaker.on_over(6.0)
    assert breaker.allows(6.0)
    breaker.on_try(6.0)  # and one whose end nobody reports, in time
    assert not breaker.allows(65.9)
    assert breaker.allows(66.0)


def test_failures_while_it_is_open_do_not_keep_it_open() -> None:
    breaker = opened()
    for now in (1.0, 2.0, 4.9):
        breaker.on_failure(now)
    assert breaker.state(5.0) is BreakerState.HALF_OPEN
