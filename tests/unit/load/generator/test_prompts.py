"""Prompts have the wanted length and share exactly what their parts share."""

from __future__ import annotations

import subprocess
import sys

from baton.load.generator.prompts import Part, PromptMaker, Vocabulary, block_parts

WORDS = Vocabulary([f"w{number}" for number in range(50)])


def test_equal_hash_ids_give_equal_beginnings_and_others_differ() -> None:
    maker = PromptMaker(WORDS, seed=1)
    one = maker.units(block_parts((0, 7, 8), 16, 40))
    two = maker.units(block_parts((0, 7, 9), 16, 48))
    three = maker.units(block_parts((1, 7, 8), 16, 40))
    assert [len(units) for units in (one, two, three)] == [40, 48, 40]
    assert one[:32] == two[:32]
    assert one[32:] != two[32:40]
    assert one[:16] != three[:16]
    assert one[16:] == three[16:]  # what a block says depends on its name alone


def test_a_block_that_is_cut_is_the_beginning_of_the_whole_one() -> None:
    maker = PromptMaker(WORDS, seed=1)
    assert maker.units(block_parts((5,), 16, 7)) == maker.units(block_parts((5,), 16, 16))[:7]


def test_token_ids_are_units_like_words() -> None:
    maker = PromptMaker(Vocabulary(range(100, 200)), seed=1)
    units = maker.units([Part("a", 300)])
    assert len(units) == 300
    assert set(units) <= set(range(100, 200))


def test_overhead_and_tokens_per_unit_are_taken_into_account_without_breaking_what_is_shared() -> None:
    vocabulary = Vocabulary(WORDS.units, tokens_per_unit=1.5, overhead=12.0)
    maker = PromptMaker(vocabulary, seed=1)
    for num_tokens in (100, 101, 512, 1000):
        units = maker.units([Part("a", num_tokens)])
        assert abs(len(units) * 1.5 + 12.0 - num_tokens) <= 0.75
    one, two = (maker.units([Part("prefix", 300), Part(name, 60)]) for name in "ab")
    assert one[:192] == two[:192]


def test_a_prompt_shorter_than_the_overhead_still_has_a_unit() -> None:
    maker = PromptMaker(Vocabulary(WORDS.units, overhead=20.0), seed=1)
    assert len(maker.units([Part("a", 5)])) == 1


def test_a_negative_overhead_is_filled_up() -> None:
    maker = PromptMaker(Vocabulary(WORDS.units, overhead=-3.0), seed=1)
    assert len(maker.units([Part("a", 50)])) == 53


def test_seeds_give_the_same_text_in_every_process() -> None:
    code = (
        "from baton.load.generator.prompts import *;"
        "print(PromptMaker(Vocabulary([f'w{n}' for n in range(50)]), 1).units(block_parts((0, 7), 16, 32)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    maker = PromptMaker(WORDS, seed=1)
    assert run.stdout.strip() == str(maker.units(block_parts((0, 7), 16, 32)))
    assert PromptMaker(WORDS, seed=2).units(block_parts((0, 7), 16, 32)) != maker.units(block_parts((0, 7), 16, 32))
