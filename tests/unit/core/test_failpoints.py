"""Failpoints: what their text means, what is wrong with other text, and when a rule fires."""

from __future__ import annotations

import pytest

from baton.services.core.failpoints import Action, Failpoints, Rule, parse_failpoints


def test_rules_are_read_from_their_text() -> None:
    text = "kv.send.frame_k=crash:after(3); prefill-0@engine.oom=raise:once ;bus.publish=delay(250):times(4):token(7);"
    assert parse_failpoints(text) == (
        Rule("kv.send.frame_k", Action.CRASH, after=3),
        Rule("engine.oom", Action.RAISE, worker_id="prefill-0", times=1),
        Rule("bus.publish", Action.DELAY, delay_s=0.25, times=4, token_id=7),
    )


@pytest.mark.parametrize("text", ["", " on ", " ; "])
def test_text_without_rules_has_none(text: str) -> None:
    assert parse_failpoints(text) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kv.send.frame_k", "is not point=action"),
        ("kv.send.frame_k=", "is not point=action"),
        ("kv.send.frame=crash", "did you mean kv.send.frame_k?"),
        ("nowhere=crash", "no such failpoint; there are prefill.before_claim,"),
        ("bus.publish=explode", "must be one of crash, raise, hang, delay(MS)"),
        ("bus.publish=delay", "delay needs milliseconds"),
        ("bus.publish=crash(3)", "delay needs milliseconds"),
        ("bus.publish=crash:sometimes", "'sometimes' is none of once, times(N), after(N), token(ID)"),
        ("bus.publish=crash:after", "'after' is none of"),
        ("bus.publish=crash:once(2)", "'once(2)' is none of"),
        ("bus.publish=crash:", "'' is none of"),
        ("bus.publish=crash:once:times(2)", "says times twice"),
        ("bus.publish=crash;engine.oom=no", "'engine.oom=no'"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_failpoints(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def fired(text: str, num_hits: int, *, worker_id: str = "", token_ids: tuple[int, ...] = ()) -> list[int]:
    """Which of so many hits of decode.step_n, counted from 1, a rule fires at."""
    failpoints = Failpoints(parse_failpoints(text), worker_id)
    return [hit for hit in range(1, num_hits + 1) if failpoints.reach("decode.step_n", lambda: token_ids)]


def test_a_rule_fires_at_every_hit_of_its_own_point() -> None:
    assert fired("decode.step_n=raise", 3) == [1, 2, 3]
    assert fired("bus.publish=raise", 3) == []


def test_after_skips_hits_and_times_bounds_those_that_fire() -> None:
    assert fired("decode.step_n=raise:after(2)", 5) == [3, 4, 5]
    assert fired("decode.step_n=raise:after(2):times(2)", 6) == [3, 4]
    assert fired("decode.step_n=raise:once", 3) == [1]


def test_a_token_counts_only_hits_where_it_is_at_work() -> None:
    failpoints = Failpoints(parse_failpoints("decode.step_n=crash:token(42):after(1)"))
    hits: list[tuple[int, ...]] = [(1, 2), (42,), (3,), (42, 5)]
    assert [failpoints.reach("decode.step_n", lambda h=hit: h) is not None for hit in hits] == [
        False,
        False,
        False,
        True,
    ]


def test_the_first_of_two_rules_that_fire_wins_and_both_count() -> None:
    failpoints = Failpoints(parse_failpoints("decode.step_n=raise:once;decode.step_n=hang:after(1)"))
    actions = [rule.action if (rule := failpoints.reach("decode.step_n")) else None for _ in range(2)]
    assert actions == [Action.RAISE, Action.HANG]


def test_a_rule_for_one_worker_is_no_other_workers() -> None:
    assert fired("decode-1@decode.step_n=raise", 1, worker_id="decode-1") == [1]
    assert fired("decode-1@decode.step_n=raise", 1, worker_id="decode-0") == []


def test_every_hit_is_counted_whether_or_not_a_rule_fires() -> None:
    failpoints = Failpoints(parse_failpoints("decode.step_n=raise:after(9)"))
    for point in ("decode.step_n", "decode.step_n", "bus.publish"):
        failpoints.reach(point)
    assert failpoints.num_reached == {"decode.step_n": 2, "bus.publish": 1}
