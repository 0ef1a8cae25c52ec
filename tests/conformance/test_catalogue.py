"""Each of the 102 behaviours is shown here, or named with the tests that show it, or named as not built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.conformance_catalogue import ELSEWHERE, LETTERS, NOT_BUILT
from helpers.references import assert_exists

HERE = {
    int(number)
    for file in Path(__file__).parent.glob("test_[a-g]_*.py")
    for number in re.findall(r"^def test_b(\d{3})_", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
}


def test_every_behaviour_has_its_place_and_only_one() -> None:
    numbers = [*HERE, *ELSEWHERE, *NOT_BUILT]
    assert sorted(numbers) == list(range(1, LETTERS["G"] + 1))


@pytest.mark.parametrize("number", sorted(ELSEWHERE))
def test_the_tests_that_show_it_exist(number: int) -> None:
    for reference in ELSEWHERE[number].tests:
        assert_exists(reference)
