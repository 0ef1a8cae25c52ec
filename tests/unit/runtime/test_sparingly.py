"""One line in a while for each key, and what was not said is counted."""

from __future__ import annotations

from structlog.testing import capture_logs

from baton.services.runtime.sparingly import Sparingly


def test_there_is_one_line_in_a_while_for_each_key() -> None:
    now = 0.0
    log = Sparingly(lambda: now)
    with capture_logs() as logs:
        for _ in range(5):
            log.warn("refused", "a", peer="a")
        log.warn("refused", "b", peer="b")
        now = 11.0
        log.warn("refused", "a", peer="a")
    assert [(line["peer"], line.get("unsaid")) for line in logs] == [("a", None), ("b", None), ("a", 4)]


def test_of_many_keys_the_oldest_is_forgotten_and_the_others_are_not() -> None:
    log = Sparingly(lambda: 0.0)
    with capture_logs() as logs:
        for key in range(257):
            log.warn("refused", str(key))
        num_lines = len(logs)
        log.warn("refused", "1")
        log.warn("refused", "256")
        assert len(logs) == num_lines == 257
        log.warn("refused", "0")  # made room for the last one: nobody knows any more that it was said
    assert len(logs) == 258
