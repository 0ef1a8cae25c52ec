"""The watchdog: what is stuck, what is only slow, and what was only stopped."""

from __future__ import annotations

import pytest

from baton.services.core.watchdog import Pulse, Watchdog, WatchdogLimits

EVERY_S = 0.25


class World:
    """A watchdog that looks every quarter of a second at a process that turns and beats unless told otherwise."""

    def __init__(self, stuck_after_s: float = WatchdogLimits().stuck_after_s, signs_per_step: int = 1) -> None:
        self.watchdog = Watchdog(WatchdogLimits(stuck_after_s, signs_per_step=signs_per_step), EVERY_S)
        self.now_s = 1000.0
        self.turns = self.beats = 0
        self.is_thread_alive = True
        self.expected_s: float | None = 0.0

    def look(self) -> str | None:
        return self.watchdog.look(Pulse(self.turns, self.beats, self.is_thread_alive, self.expected_s), self.now_s)

    def seconds_until_stuck(self, *, turning: bool, beating: bool, most_s: float = 2000.0) -> tuple[float, str | None]:
        start_s = self.now_s
        while self.now_s - start_s < most_s:
            self.now_s += EVERY_S
            self.turns += turning
            self.beats += beating
            reason = self.look()
            if reason is not None:
                return self.now_s - start_s, reason
        return self.now_s - start_s, None


def test_a_process_that_gets_on_is_left_alone() -> None:
    assert World().seconds_until_stuck(turning=True, beating=True)[1] is None


def test_a_step_thread_that_does_not_turn_is_found_out_within_five_seconds() -> None:
    after_s, reason = World().seconds_until_stuck(turning=False, beating=True)
    assert 3.5 < after_s < 4.3
    assert reason == "no step ended for 3.8 s"


def test_an_event_loop_that_does_not_turn_is_found_out_within_five_seconds() -> None:
    after_s, reason = World().seconds_until_stuck(turning=True, beating=False)
    assert 3.5 < after_s < 4.3
    assert reason == "the event loop did not turn for 3.8 s"


def test_a_thread_that_has_ended_is_noticed_at_once() -> None:
    world = World()
    world.is_thread_alive = False
    assert world.look() == "the step thread has ended"


def test_a_step_may_take_ten_times_what_it_is_expected_to_take() -> None:
    world = World()
    world.expected_s = 3.0
    after_s, _ = world.seconds_until_stuck(turning=False, beating=True)
    assert after_s == pytest.approx(30.0, abs=3 * EVERY_S)


@pytest.mark.parametrize(("num_signs", "limit_s"), [(2, 15.0), (5, 6.0), (10, 3.5), (80, 3.5)])
def test_a_step_that_gives_signs_of_life_may_be_silent_for_a_part_of_that(num_signs: int, limit_s: float) -> None:
    """Ten times a part, but never less than the whole, and never less than what any step may take."""
    world = World(signs_per_step=num_signs)
    world.expected_s = 3.0
    after_s, _ = world.seconds_until_stuck(turning=False, beating=True)
    assert after_s == pytest.approx(limit_s, abs=3 * EVERY_S)
    world.expected_s = 100.0
    world.turns += 1
    assert world.seconds_until_stuck(turning=False, beating=True)[0] > 99.0


def test_a_step_of_which_nobody_knows_how_long_it_takes_gets_a_minute_to_each_sign_of_life() -> None:
    world = World()
    world.expected_s = None
    for _ in range(3):
        assert world.seconds_until_stuck(turning=False, beating=True, most_s=55.0)[1] is None
        world.turns += 1
    after_s, _ = world.seconds_until_stuck(turning=False, beating=True)
    assert after_s == pytest.approx(60.0, abs=3 * EVERY_S)


def test_the_limit_is_the_operators() -> None:
    after_s, _ = World(stuck_after_s=30.0).seconds_until_stuck(turning=False, beating=True)
    assert after_s == pytest.approx(30.0, abs=3 * EVERY_S)
    world = World(stuck_after_s=300.0)
    world.expected_s = None
    assert world.seconds_until_stuck(turning=False, beating=True)[0] > 299.0


def test_a_process_that_was_stopped_and_woken_is_not_stuck() -> None:
    world = World()
    world.look()
    world.now_s += 60.0  # nobody got a turn, the watchdog included
    assert world.look() is None
    assert world.seconds_until_stuck(turning=True, beating=True, most_s=20.0)[1] is None


def test_any_progress_starts_the_count_anew() -> None:
    world = World()
    for _ in range(5):
        assert world.seconds_until_stuck(turning=False, beating=True, most_s=3.0)[1] is None
        world.turns += 1
