"""Stop strings over a stream of text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.services.core.stop import StopChecker


def run(pieces: list[str], stop: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    """All text shown, and the stop string that ended it."""
    checker = StopChecker(stop, include_stop)
    shown = ""
    for piece in pieces:
        result = checker.feed(piece)
        shown += result.text
        if result.matched is not None:
            return shown, result.matched
    return shown + checker.flush(), None


def expected(text: str, stop: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The same by looking at every prefix of the whole text."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            longest = max(matches, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


def test_a_stop_string_over_several_pieces_is_caught_and_nothing_of_it_leaks() -> None:
    checker = StopChecker(["<|end|>"])
    assert [checker.feed(piece).text for piece in ["Hello <", "|e", "nd"]] == ["Hello ", "", ""]
    result = checker.feed("|> more")
    assert (result.text, result.matched) == ("", "<|end|>")


def test_the_stop_string_is_shown_where_it_is_asked_for_but_nothing_behind_it() -> None:
    assert run(["one tw", "o three"], ["two"], include_stop=True) == ("one two", "two")


def test_the_match_that_ends_first_wins_whatever_the_order_of_the_stop_strings() -> None:
    for stop in (["late", "early"], ["early", "late"]):
        assert run(["an early and a late one"], stop) == ("an ", "early")


def test_of_two_that_end_together_the_longer_wins() -> None:
    assert run(["so it ends"], ["ends", "it ends"]) == ("so ", "it ends")


def test_a_stop_string_at_the_very_first_token_leaves_no_text() -> None:
    assert run(["STOP"], ["STOP"]) == ("", "STOP")


def test_text_that_only_began_like_a_stop_string_is_shown_when_it_goes_on_otherwise_or_ends() -> None:
    checker = StopChecker(["aab"])
    assert [checker.feed(piece).text for piece in "aaac"] == ["", "", "a", "aac"]
    assert checker.feed("xa").text == "x"
    assert checker.flush() == "a"
    assert checker.flush() == ""
    assert checker.feed("ab").text == "ab", "what was flushed is no longer part of a match"


def test_what_follows_a_match_is_not_shown() -> None:
    checker = StopChecker(["."])
    checker.feed("end.")
    result = checker.feed(" more")
    assert (result.text, result.matched) == ("", ".")


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert StopChecker([]).feed("text").text == "text"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=8),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include_stop=st.booleans(),
)
def test_pieces_do_not_change_the_outcome(pieces: list[str], stop: list[str], include_stop: bool) -> None:
    assert run(pieces, stop, include_stop) == expected("".join(pieces), stop, include_stop)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text("ab", max_size=12), stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2))
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    checker = StopChecker(stop)
    shown = ""
    for end, character in enumerate(text, start=1):
        result = checker.feed(character)
        shown += result.text
        if result.matched:
            return
        tail = max((n for s in stop for n in range(1, len(s)) if text[:end].endswith(s[:n])), default=0)
        assert shown == text[: end - tail]
