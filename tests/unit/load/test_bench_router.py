"""The router's benchmark, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.load import bench_router


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_router, "NUM_WORKERS", 40)
    monkeypatch.setattr(bench_router, "NUM_INDEXED", 2000)
    monkeypatch.setattr(bench_router, "NUM_DECISIONS", 60)
    monkeypatch.delenv(bench_router.TRACE_VARIABLE, raising=False)


def test_a_conversation_finds_the_blocks_of_its_turns_before(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    turns = [
        {
            "timestamp": 60_000 * turn,
            "input_length": 512 * (4 + turn),
            "hash_ids": [*range(10 * talk, 10 * talk + 4 + turn)],
        }
        for turn in range(4)
        for talk in range(5)
    ]
    trace.write_text("\n".join(json.dumps(turn) for turn in turns))
    *others, hits = bench_router.bench_router(trace)
    assert hits.value == hits.limit  # nothing is in the way of finding all of them
    assert hits.value is not None
    assert hits.value > 0.4
    assert all(row.value and row.limit for row in others)


def test_without_a_trace_the_hit_rate_is_skipped_with_its_reason() -> None:
    *_, hits = bench_router.bench_router(None)
    assert hits.value is None
    assert bench_router.TRACE_VARIABLE in hits.skipped
