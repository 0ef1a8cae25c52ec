"""When a link counts as silent: nothing was heard of what was pushed, and somebody was there to hear it."""

from __future__ import annotations

import pytest

from baton.kvtransfer.silence import VerdictWatch

EVERY_S = 0.5
A, B = b"a", b"b"


class World:
    """A watch that looks every half second."""

    def __init__(self) -> None:
        self.watch = VerdictWatch(4.0, EVERY_S)
        self.now_s = 100.0

    def silent_after(self, *, needed_s: float = 0.0, most_s: float = 60.0) -> float | None:
        start_s = self.now_s
        while self.now_s - start_s < most_s:
            if self.watch.look(needed_s, self.now_s) is not None:
                return self.now_s - start_s
            self.now_s += EVERY_S
        return None


def test_a_link_with_nothing_under_way_is_never_silent() -> None:
    world = World()
    assert world.silent_after() is None
    world.watch.pushed(A, [0, 1])
    world.watch.judged(A, [0, 1])
    assert world.watch.num_blocks == 0
    assert world.silent_after() is None


@pytest.mark.parametrize("needed_s", [0.0, 7.0])
def test_blocks_without_a_verdict_make_it_silent_later_where_the_link_needs_longer(needed_s: float) -> None:
    world = World()
    world.watch.pushed(A, [0, 1])
    assert world.silent_after(needed_s=needed_s) == pytest.approx(4.0 + needed_s, abs=2 * EVERY_S)


def test_any_verdict_is_progress_and_more_that_is_pushed_is_none() -> None:
    world = World()
    world.watch.pushed(A, range(10))
    for index in range(8):
        assert world.silent_after(most_s=3.0) is None
        world.watch.judged(B if index % 2 else A, [index])
    assert world.silent_after(most_s=3.0) is None
    world.watch.pushed(B, range(5))
    assert world.silent_after() == pytest.approx(1.0, abs=2 * EVERY_S)


def test_blocks_that_the_receiver_lacks_make_a_link_doubtful_that_was_silent_for_a_while() -> None:
    world = World()
    world.watch.pushed(A, [0, 1])
    assert not world.watch.is_doubtful(A)
    assert world.silent_after(most_s=2.0) is None
    assert world.watch.is_doubtful(A)
    assert not world.watch.is_doubtful(B)
    world.watch.judged(A, [0])
    assert not world.watch.is_doubtful(A)


def test_what_was_given_up_is_not_waited_for() -> None:
    world = World()
    world.watch.pushed(A, [0])
    world.watch.pushed(B, [0])
    assert world.silent_after(most_s=3.0) is None
    world.watch.dropped(A)
    assert world.watch.num_blocks == 1
    world.watch.clear()
    assert world.silent_after() is None


def test_the_wait_begins_with_what_is_pushed_after_a_pause() -> None:
    world = World()
    world.watch.pushed(A, [0])
    assert world.silent_after(most_s=3.5) is None
    world.watch.clear()
    world.now_s += 100.0
    world.watch.pushed(A, [0])
    assert world.silent_after() == pytest.approx(4.0, abs=2 * EVERY_S)


def test_a_process_that_was_stopped_and_woken_does_not_blame_the_link() -> None:
    world = World()
    world.watch.pushed(A, [0])
    world.watch.look(0.0, world.now_s)
    world.now_s += 60.0
    assert world.watch.look(0.0, world.now_s) is None
    world.watch.judged(A, [0])
    assert world.silent_after() is None
