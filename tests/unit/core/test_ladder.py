"""The failure ladder, rung by rung: what follows from each failure, and when a request is given up."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.ladder_world import PROMPT, LadderWorld, decoder, prefiller, tokens

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.ladder import LadderState
from baton.services.core.ladder_steps import LadderLimits, PartOutput, Start
from baton.services.core.request import FinishReason


def make(**options: Any) -> LadderWorld:
    workers = [prefiller("p0"), prefiller("p1"), decoder("d0"), decoder("d1")]
    return LadderWorld(**{"workers": workers, "max_tokens": 4, **options})


def refusal(code: ErrorCode, *, retryable: bool = True) -> BatonError:
    return BatonError(code, "as scripted", retryable=retryable)


def test_a_pair_answers_and_both_parts_are_over() -> None:
    world = make()
    prefill, decode = world.choose()
    assert prefill is not None
    world.say(prefill, PartOutput(tokens(0, 10)))
    world.say(prefill, PartOutput(handed_over=True))
    world.say(decode, PartOutput(tokens(1, 11, 12)))
    world.say(decode, PartOutput(tokens(3, 13, finish=FinishReason.LENGTH)))
    assert world.emitted == [10, 11, 12, 13]
    assert (world.end, world.ladder.fallbacks) == (("length", None), [])
    assert world.cancelled == []
    world.check()


def test_tokens_of_the_decode_worker_wait_for_the_first_one() -> None:
    world = make()
    prefill, decode = world.choose()
    assert prefill is not None
    world.say(decode, PartOutput(tokens(1, 11)))
    assert world.emitted == []
    world.say(prefill, PartOutput(tokens(0, 10)))
    assert world.emitted == [10, 11]


def test_what_came_is_in_the_next_attempt_and_is_not_asked_for_again() -> None:
    world = make()
    prefill, decode = world.choose()
    assert prefill is not None
    world.say(prefill, PartOutput(tokens(0, 10)))
    world.say(decode, PartOutput(tokens(1, 11)))
    world.lose(decode)
    world.choose()
    assert world.starts[-1].token_ids == [*PROMPT, 10, 11]
    assert world.starts[-1].attempt.number == 2
    assert (prefill, True) in world.cancelled


@pytest.mark.parametrize(
    ("lost", "rung", "kept"), [("decode", "other_decode", "prefill"), ("prefill", "other_prefill", "decode")]
)
def test_the_worker_that_is_left_keeps_its_part(lost: str, rung: str, kept: str) -> None:
    for number in range(8):  # whatever the router's spread says
        world = make(name=f"r{number}")
        first = dict(zip(("prefill", "decode"), world.choose(), strict=True))
        world.lose(first[lost])
        second = dict(zip(("prefill", "decode"), world.choose(), strict=True))
        assert second[kept] == first[kept]
        assert second[lost] != first[lost]
        assert world.ladder.fallbacks == [rung]


def test_a_prefill_worker_lost_behind_its_handoff_ends_nothing() -> None:
    world = make()
    prefill, decode = world.choose()
    assert prefill is not None
    world.say(prefill, PartOutput(tokens(0, 10)))
    world.say(decode, PartOutput(tokens(1, 11)))
    world.lose(prefill)
    assert world.ladder.state is LadderState.RUNNING
    world.say(decode, PartOutput(tokens(2, 12, 13, finish=FinishReason.STOP)))
    assert world.end == ("stop", None)
    world.check()


def test_a_pair_that_cannot_hand_over_is_not_tried_again_but_its_workers_are() -> None:
    world = make(workers=[prefiller("p0"), decoder("d0"), decoder("d1")])
    prefill, decode = world.choose()
    assert prefill is not None
    world.say(prefill, PartOutput(error=refusal(ErrorCode.HANDOFF_FAILED)))
    again, other = world.choose()
    assert (again, other == decode) == (prefill, False)
    world.say(other, PartOutput(error=refusal(ErrorCode.HANDOFF_FAILED)))
    assert world.choose()[0] is None
    assert world.ladder.fallbacks == ["other_decode", "local_prefill"]


def test_after_three_pairs_a_decode_worker_does_it_alone() -> None:
    world = make(workers=[*(prefiller(f"p{n}") for n in range(5)), decoder("d0")])
    for _ in range(3):
        prefill, _decode = world.choose()
        assert prefill is not None
        world.say(prefill, PartOutput(error=refusal(ErrorCode.HANDOFF_FAILED)))
    assert world.choose() == (None, "d0")


def test_two_lost_workers_are_the_end_of_it() -> None:
    world = make()
    for _ in range(2):
        _, decode = world.choose()
        world.lose(decode)
    world.look()
    assert world.end == ("error", ErrorCode.QUARANTINED)
    assert len(world.starts) == 2
    world.check()


def test_after_a_loss_it_waits_a_moment_for_what_else_went_down() -> None:
    """Two decode workers of one host die: the request must not count both, and be quarantined for it."""
    world = make(limits=LadderLimits(loss_pause_s=0.1))
    world.lose(world.choose()[1])
    world.look_now()
    assert (len(world.starts), world.ladder.wake_s, world.ladder.is_waiting) == (1, 0.1, False)
    world.workers = {"d7": decoder("d7")}
    world.now = 0.1
    assert world.choose() == (None, "d7")


def test_a_worker_whose_link_came_back_did_not_die_of_the_request() -> None:
    world = make(workers=[decoder("d0")])
    for _ in range(3):
        _, decode = world.choose()
        world.lose(decode)
        world.look()
        assert world.ladder.is_waiting
        world.come(decoder("d0"))
    world.choose()
    assert len(world.starts) == 4
    assert world.ladder.fallbacks == ["queued", "same_workers"] * 3


def test_a_worker_that_was_started_anew_did_die() -> None:
    world = make(workers=[decoder("d0")])
    world.lose(world.choose()[1])
    world.come(decoder("d0-again"))
    world.lose(world.choose()[1])
    world.come(decoder("d0-and-again"))
    world.look()
    assert world.end == ("error", ErrorCode.QUARANTINED)


def test_a_worker_that_refuses_is_asked_again_later_and_later() -> None:
    world = make(workers=[decoder("d0")], limits=LadderLimits(first_pause_s=0.25))
    for pause_s in (0.25, 0.5, 1.0):
        world.say(world.choose()[1], PartOutput(error=refusal(ErrorCode.OVERLOADED)))
        world.look()
        assert world.ladder.is_waiting
        assert world.ladder.wake_s == world.now + pause_s
        world.now += pause_s
    world.choose()
    assert not world.ladder.is_waiting


def test_a_worker_that_failed_is_not_asked_again_and_not_waited_for() -> None:
    world = make(workers=[decoder("d0"), decoder("d1")])
    for _ in range(2):
        world.say(world.choose()[1], PartOutput(error=refusal(ErrorCode.INTERNAL)))
    world.look()
    assert world.end == ("error", ErrorCode.INTERNAL)
    world.check()


def test_without_decode_workers_it_waits_and_is_refused_in_the_end() -> None:
    world = make(workers=[prefiller("p0")], limits=LadderLimits(max_wait_s=5.0))
    world.look()
    assert (world.ladder.is_waiting, world.ladder.wake_s) == (True, 5.0)
    world.now = 4.9
    world.look()
    assert world.end is None
    world.now = 5.0
    world.look()
    assert world.end == ("refused", ErrorCode.NO_WORKERS)
    assert world.error is not None
    assert world.error.retry_after_s
    world.check()


@pytest.mark.parametrize("deadline_s", [3.0, 90.0])
def test_the_wait_ends_at_the_deadline_with_the_same_refusal(deadline_s: float) -> None:
    world = make(workers=[], limits=LadderLimits(max_wait_s=60.0), deadline_s=deadline_s)
    world.look()
    assert world.ladder.wake_s == min(deadline_s, 60.0)
    world.now = world.ladder.wake_s
    world.look()
    assert world.end == ("refused", ErrorCode.NO_WORKERS)


def test_a_worker_that_comes_ends_the_wait() -> None:
    world = make(workers=[])
    world.look()
    world.now = 7.0
    world.come(decoder("d0"))
    assert world.choose() == (None, "d0")
    assert world.ladder.fallbacks == ["queued"]
    assert not world.ladder.is_waiting


def test_time_that_runs_out_ends_what_runs_and_cancels_it() -> None:
    world = make(deadline_s=9.0)
    prefill, decode = world.choose()
    assert world.ladder.wake_s == 9.0
    world.now = 8.9
    world.apply(world.ladder.on_time(world.now))
    assert world.end is None
    world.now = 9.0
    world.apply(world.ladder.on_time(world.now))
    assert world.end == ("error", ErrorCode.DEADLINE_EXCEEDED)
    assert set(world.cancelled) == {(prefill, True), (decode, True)}
    world.check()


def test_an_error_that_another_attempt_cannot_mend_ends_it_at_once() -> None:
    world = make()
    world.say(world.choose()[1], PartOutput(error=refusal(ErrorCode.CONTEXT_LENGTH_EXCEEDED, retryable=False)))
    assert world.end == ("error", ErrorCode.CONTEXT_LENGTH_EXCEEDED)
    world.check()


def test_attempts_are_bounded() -> None:
    world = make(workers=[decoder(f"d{n}") for n in range(9)], limits=LadderLimits(max_attempts=4))
    for _ in range(4):
        world.say(world.choose()[1], PartOutput(error=refusal(ErrorCode.INTERNAL)))
    assert world.end == ("error", ErrorCode.INTERNAL)
    world.check()


def test_what_a_worker_says_of_an_attempt_that_is_over_is_fenced() -> None:
    world = make()
    prefill, decode = world.choose()
    world.lose(decode)
    world.choose()
    before = world.ladder.num_fenced
    commands = world.ladder.on_output(1, decode, PartOutput(tokens(1, 99)), world.now)
    assert (commands, world.ladder.num_fenced) == ([], before + 1)
    assert prefill is not None
    assert world.ladder.on_output(1, prefill, PartOutput(tokens(0, 99)), world.now) == []
    assert world.emitted == []


def test_workers_that_end_without_the_last_token_have_failed() -> None:
    world = make(workers=[decoder("d0"), decoder("d1")])
    _, decode = world.choose()
    world.say(decode, PartOutput(tokens(1, 11, finish=FinishReason.LENGTH)))  # token 0 never came
    world.choose()
    assert world.starts[-1].token_ids == PROMPT


def test_more_tokens_than_asked_for_are_an_error() -> None:
    world = make()
    world.say(world.choose()[1], PartOutput(tokens(0, 1, 2, 3, 4, 5)))
    assert world.end == ("error", ErrorCode.INTERNAL)
    world.check()


def test_a_request_that_has_all_its_tokens_ends_even_if_only_that_word_was_lost() -> None:
    world = make()
    _, decode = world.choose()
    world.say(decode, PartOutput(tokens(0, 1, 2, 3, 4)))
    world.lose(decode)
    assert world.end == ("length", None)
    world.check()


def test_a_worker_that_gives_the_request_up_is_not_dead() -> None:
    world = make(workers=[decoder("d0"), decoder("d1"), decoder("d2")])
    for _ in range(3):
        world.say(world.choose()[1], PartOutput(tokens(0, finish=FinishReason.ABORT)))
    assert world.end is None


@pytest.mark.parametrize("when", ["before", "running", "waiting"])
def test_whoever_asked_can_end_it_at_any_time(when: str) -> None:
    world = make(workers=[] if when == "waiting" else [prefiller("p0"), decoder("d0")])
    if when == "running":
        world.choose()
    elif when == "waiting":
        world.look()
    world.apply(world.ladder.on_cancel())
    assert world.end == ("abort", None)
    assert world.ladder.on_cancel() == []
    world.check()


def test_nothing_is_done_for_a_request_that_has_ended() -> None:
    world = make()
    world.choose()
    world.apply(world.ladder.on_cancel("stop"))
    assert world.ladder.attempts[0].outcome == "done"
    world.now = 1e9
    assert not world.ladder.wants_workers
    world.look()
    assert world.ladder.on_time(world.now) == []
    assert not any(isinstance(command, Start) for command in world.commands[2:])


def test_the_next_token_in_the_middle_is_taken_without_ceremony_and_nothing_else_is() -> None:
    world = make(max_tokens=5)
    prefill, decode = world.choose()
    assert prefill is not None
    ladder = world.ladder
    assert not ladder.take_next(1, decode, 0, [10]), "the first one is no ordinary token"
    world.say(decode, PartOutput(tokens(1, 11)))
    assert not ladder.take_next(1, decode, 2, [12]), "one before it is missing"
    world.say(prefill, PartOutput(tokens(0, 10)))
    for attempt, incarnation, index in (
        (2, decode, 2),
        (1, prefill, 2),
        (1, "nobody", 2),
        (1, decode, 1),
        (1, decode, 3),
    ):
        assert not ladder.take_next(attempt, incarnation, index, [12])
    assert ladder.take_next(1, decode, 2, [12])
    assert ladder.token_ids == [10, 11, 12]
    world.emitted.append(12)
    world.say(decode, PartOutput(tokens(3, 13)))
    assert ladder.take_next(1, decode, 4, [14])
    assert not ladder.take_next(1, decode, 5, [15]), "more than was asked for is a failure"
    assert ladder.token_ids == [10, 11, 12, 13, 14]


def test_several_next_tokens_are_taken_whole_or_not_at_all() -> None:
    world = make(max_tokens=6)
    prefill, decode = world.choose()
    assert prefill is not None
    ladder = world.ladder
    world.say(prefill, PartOutput(tokens(0, 10)))
    assert ladder.take_next(1, decode, 1, [11, 12])
    assert not ladder.take_next(1, decode, 2, [12, 13]), "one of them was there already"
    assert not ladder.take_next(1, decode, 3, [13, 14, 15, 16]), "one more than was asked for"
    assert ladder.token_ids == [10, 11, 12]
    assert ladder.take_next(1, decode, 3, [13, 14, 15])
    assert ladder.token_ids == [10, 11, 12, 13, 14, 15]
