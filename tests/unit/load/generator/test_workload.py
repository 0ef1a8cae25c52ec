"""What a run is going to send follows from options, trace and seed."""

from __future__ import annotations

import random
import statistics

import pytest

from baton.load.generator.prompts import Part
from baton.load.generator.traces import TraceRow
from baton.load.generator.workload import Lengths, from_trace, made_up, num_requests, until


def test_made_up_requests_share_the_prefix_and_nothing_else() -> None:
    one, two = made_up([0.0, 1.0], Lengths(100, 10, prefix_len=32), random.Random(0))
    assert one.turns[0].parts[0] == two.turns[0].parts[0] == Part("prefix", 32)
    assert one.turns[0].parts[1].name != two.turns[0].parts[1].name
    assert (one.turns[0].input_len, one.turns[0].output_len, two.at_s) == (132, 10, 1.0)


def test_spread_lengths_stay_in_their_range_around_their_mean() -> None:
    conversations = made_up([0.0] * 2000, Lengths(100, 40, spread=0.5), random.Random(0))
    lengths = [one.turns[0].input_len for one in conversations]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert statistics.fmean(lengths) == pytest.approx(100, rel=0.03)


def test_conversations_have_turns_with_exponential_pauses_but_the_first() -> None:
    lengths = Lengths(100, 10, turn_input_len=7, num_turns=3, pause_s=2.0, prefix_len=16)
    conversations = made_up([0.0] * 1000, lengths, random.Random(0))
    assert num_requests(conversations) == 3000
    first, second, third = conversations[0].turns
    assert (first.pause_s, first.input_len, second.input_len, third.input_len) == (0.0, 116, 7, 7)
    pauses = [turn.pause_s for one in conversations for turn in one.turns[1:]]
    assert statistics.fmean(pauses) == pytest.approx(2.0, rel=0.08)
    assert statistics.pstdev(pauses) == pytest.approx(2.0, rel=0.1)


def test_traces_keep_their_times_unless_others_are_given_and_are_cut_to_limits() -> None:
    rows = [TraceRow(0.0, 40, 9, (1, 2, 3), 16), TraceRow(2.0, 30, 90)]
    one, two = from_trace(rows, None, max_input_len=20, max_output_len=50)
    assert (one.at_s, two.at_s) == (0.0, 2.0)
    assert one.turns[0].parts == (Part(("block", 1), 16), Part(("block", 2), 4))
    assert (two.turns[0].input_len, two.turns[0].output_len) == (20, 50)
    assert [row.at_s for row in from_trace(rows, [5.0, 6.0])] == [5.0, 6.0]


def test_nothing_begins_after_the_duration() -> None:
    assert [one.at_s for one in until(made_up([0.0, 1.0, 2.0], Lengths(1, 1), random.Random(0)), 2.0)] == [0.0, 1.0]
