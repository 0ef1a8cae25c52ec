"""Public request traces as one kind of row. Pure: lines in, rows out.

Known formats, told apart by their first line:

* Mooncake: JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, the ordered ids of the
  prompt's blocks of 512 tokens. Equal ids mean an equal prefix up to and including that block.
* Qwen-Bailian: the same with ``chat_id``, seconds and blocks of 16 tokens.
* Azure: CSV with ``TIMESTAMP`` (wall clock), ``ContextTokens``, ``GeneratedTokens``.
* BurstGPT: CSV with ``Timestamp`` (s), ``Request tokens``, ``Response tokens``.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain, islice
from typing import Any

MOONCAKE_BLOCK_SIZE = 512
BAILIAN_BLOCK_SIZE = 16


class TraceError(ValueError):
    """What cannot be read, with its line."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace. ``hash_ids`` name its blocks of ``block_size`` tokens, or are empty where unknown."""

    at_s: float  # from the first row
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    block_size: int = 0


def parse_trace(lines: Iterable[str], *, limit: int | None = None) -> list[TraceRow]:
    """At most ``limit`` rows, ordered by time, the first at 0. Raises TraceError."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        raise TraceError("the trace is empty")
    rest = chain([first], numbered)
    rows = _json_rows(rest) if first[1].lstrip().startswith("{") else _csv_rows(rest)
    taken = list(islice(rows, limit))
    if not taken:
        raise TraceError("the trace has a heading and no rows")
    taken.sort(key=lambda row: row.at_s)
    start_s = taken[0].at_s
    return [replace(row, at_s=row.at_s - start_s) for row in taken]


def scale_rows(rows: Iterable[TraceRow], *, time_scale: float, length_scale: float) -> list[TraceRow]:
    """Times and lengths multiplied. Blocks shrink with the lengths, so that which prompts share what stays as it was.

    Nothing shrinks below one token. Of a prompt with ``hash_ids`` the last block keeps its share of filling.
    """
    return [_scaled(row, time_scale, length_scale) for row in rows]


def _scaled(row: TraceRow, time_scale: float, length_scale: float) -> TraceRow:
    output_len = max(1, round(row.output_len * length_scale))
    at_s = row.at_s * time_scale
    if not row.hash_ids:
        return TraceRow(at_s, max(1, round(row.input_len * length_scale)), output_len)
    block_size = max(1, round(row.block_size * length_scale))
    num_full = len(row.hash_ids) - 1
    filled = row.input_len - num_full * row.block_size
    last = min(block_size, max(1, math.ceil(filled * block_size / row.block_size)))
    return TraceRow(at_s, num_full * block_size + last, output_len, row.hash_ids, block_size)


def _json_rows(lines: Iterable[tuple[int, str]]) -> Iterator[TraceRow]:
    for number, line in lines:
        try:
            fields = json.loads(line)
            is_bailian = "chat_id" in fields
            yield _row(
                at_s=float(fields["timestamp"]) / (1.0 if is_bailian else 1e3),
                input_len=int(fields["input_length"]),
                output_len=int(fields["output_length"]),
                hash_ids=tuple(int(name) for name in fields.get("hash_ids") or ()),
                block_size=BAILIAN_BLOCK_SIZE if is_bailian else MOONCAKE_BLOCK_SIZE,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TraceError(f"line {number}: {_words(error)}") from None


def _csv_rows(lines: Iterable[tuple[int, str]]) -> Iterator[TraceRow]:
    numbers: list[int] = []

    def text() -> Iterator[str]:
        for number, line in lines:
            numbers.append(number)
            yield line

    reader = csv.DictReader(text())
    names = reader.fieldnames or []
    known = [one for one in _CSV_FORMATS if set(one[0]) <= set(names)]
    if not known:
        raise TraceError(f"line 1: neither a JSON object nor the columns of a known trace: {', '.join(names)[:200]}")
    columns, seconds = known[0]
    for record in reader:
        try:
            yield _csv_row(record, columns, seconds)
        except (ValueError, TypeError) as error:
            raise TraceError(f"line {numbers[-1]}: {_words(error)}") from None


def _csv_row(record: Mapping[str, Any], columns: tuple[str, str, str], seconds: Callable[[str], float]) -> TraceRow:
    at, input_len, output_len = (record[name] for name in columns)
    return _row(at_s=seconds(at), input_len=int(input_len), output_len=int(output_len), hash_ids=(), block_size=0)


def _row(*, at_s: float, input_len: int, output_len: int, hash_ids: tuple[int, ...], block_size: int) -> TraceRow:
    if not math.isfinite(at_s):
        raise ValueError("the time is no number")
    if input_len < 1 or output_len < 0:
        raise ValueError(f"lengths must be positive, got {input_len} and {output_len}")
    if not hash_ids:
        return TraceRow(at_s, input_len, max(1, output_len))
    if len(hash_ids) != math.ceil(input_len / block_size):
        raise ValueError(f"{len(hash_ids)} hash_ids for {input_len} tokens in blocks of {block_size}")
    return TraceRow(at_s, input_len, max(1, output_len), hash_ids, block_size)


def _wall_clock_s(text: str) -> float:
    # Seven digits of a second are more than fromisoformat takes before Python 3.11's microseconds.
    whole, _, fraction = text.partition(".")
    digits = fraction.split("+")[0].rstrip("Z")
    moment = datetime.fromisoformat(whole + "+00:00" if "+" not in whole else whole)
    return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)


def _words(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


# Columns of time, prompt and answer, and how to read the time.
_CSV_FORMATS: tuple[tuple[tuple[str, str, str], Callable[[str], float]], ...] = (
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _wall_clock_s),
    (("Timestamp", "Request tokens", "Response tokens"), float),
)
