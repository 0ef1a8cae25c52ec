"""Public trace formats become rows, and what is no row is named with its line."""

from __future__ import annotations

import pytest

from baton.load.generator.traces import TraceError, TraceRow, parse_trace, scale_rows

MOONCAKE = [
    '{"timestamp": 3000, "input_length": 1100, "output_length": 52, "hash_ids": [0, 7, 8]}',
    '{"timestamp": 0, "input_length": 512, "output_length": 500, "hash_ids": [0]}',
    "",
    '{"timestamp": 6000, "input_length": 513, "output_length": 0, "hash_ids": [0, 7]}',
]
AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.0319600,3180,8",
    "2023-11-16 18:18:03.9799600,110,27",
]


def test_mooncake_rows_are_ordered_from_zero_with_the_hashes_of_their_blocks() -> None:
    assert parse_trace(MOONCAKE) == [
        TraceRow(0.0, 512, 500, (0,), 512),
        TraceRow(3.0, 1100, 52, (0, 7, 8), 512),
        TraceRow(6.0, 513, 1, (0, 7), 512),
    ]


def test_bailian_rows_have_seconds_and_small_blocks() -> None:
    line = '{"chat_id": 1, "timestamp": 2.5, "input_length": 17, "output_length": 3, "turn": 1, "hash_ids": [4, 5]}'
    assert parse_trace([line, line.replace("2.5", "4.0")])[1] == TraceRow(1.5, 17, 3, (4, 5), 16)


def test_azure_wall_clocks_become_offsets() -> None:
    rows = parse_trace(AZURE)
    assert [row.at_s for row in rows] == pytest.approx([0.0, 0.052, 60.0], abs=1e-6)
    assert [(row.input_len, row.output_len) for row in rows] == [(4808, 10), (3180, 8), (110, 27)]


def test_burstgpt_columns_are_known_too() -> None:
    heading = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    rows = parse_trace([heading, "5,ChatGPT,472,18,490,Conversation log", "45,ChatGPT,1087,230,1317,Conversation log"])
    assert [(row.at_s, row.input_len, row.output_len) for row in rows] == [(0.0, 472, 18), (40.0, 1087, 230)]


def test_a_limit_reads_no_further() -> None:
    assert len(parse_trace([*AZURE[:2], "nonsense"], limit=1)) == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "empty"),
        (AZURE[:1], "no rows"),
        (["a,b,c", "1,2,3"], "line 1: neither a JSON object nor the columns"),
        ([*AZURE, "2023-11-16 18:19:03,x,1"], "line 5: "),
        ([*AZURE, "yesterday,1,1"], "line 5: "),
        ([MOONCAKE[0], "{"], "line 2: "),
        (['{"timestamp": 0, "input_length": 5}'], "line 1: there is no 'output_length'"),
        (['{"timestamp": 0, "input_length": 0, "output_length": 1}'], "lengths must be positive"),
        (['{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}'], "1 hash_ids for 600 tokens"),
        (['{"timestamp": NaN, "input_length": 6, "output_length": 1}'], "the time is no number"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(lines: list[str], words: str) -> None:
    with pytest.raises(TraceError, match=words):
        parse_trace(lines)


def test_scaling_multiplies_times_and_lengths_and_keeps_what_is_shared() -> None:
    rows = scale_rows(parse_trace(MOONCAKE), time_scale=0.5, length_scale=1 / 32)
    assert rows == [
        TraceRow(0.0, 16, 16, (0,), 16),
        TraceRow(1.5, 35, 2, (0, 7, 8), 16),  # two blocks and 3 of 16 for 76 of 512
        TraceRow(3.0, 17, 1, (0, 7), 16),  # one token stays one
    ]
    assert scale_rows([TraceRow(1.0, 1000, 100)], time_scale=2.0, length_scale=0.1) == [TraceRow(2.0, 100, 10)]


def test_nothing_shrinks_below_one_token() -> None:
    row = scale_rows([TraceRow(0.0, 1100, 3, (0, 1, 2), 512)], time_scale=1.0, length_scale=1e-6)[0]
    assert (row.input_len, row.output_len, row.block_size) == (3, 1, 1)
