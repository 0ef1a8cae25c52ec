"""Threads that share a job: everything once and in order, nothing after its end, nobody waiting for a busy thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from baton.kvtransfer.crew import Crew, in_pieces, share, shared_checksums, shared_copy
from baton.kvtransfer.rows import Rows

WAIT_S = 30


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew(3, "test-crew") as made:
        yield made


def test_results_come_in_the_order_of_the_pieces_whoever_did_them(crew: Crew) -> None:
    others = threading.Barrier(3)

    def piece(number: int) -> tuple[int, str]:
        if number < 3:
            others.wait(WAIT_S)  # the first three are done by three threads at the same time
        return number, threading.current_thread().name

    with closing(share(crew, [partial(piece, number) for number in range(20)])) as results:
        done = list(results)
    assert [number for number, _ in done] == list(range(20))
    assert len({name for _, name in done}) == 3


def test_with_another_executor_the_caller_works_alone() -> None:
    with ThreadPoolExecutor(2) as executor, closing(share(executor, [threading.current_thread] * 5)) as results:
        assert set(results) == {threading.current_thread()}


def test_jobs_that_fill_the_crew_do_not_wait_for_each_other(crew: Crew) -> None:
    begun = threading.Barrier(3)

    def job() -> list[int]:
        begun.wait(WAIT_S)  # every thread of the crew has a job of its own: none is free to help
        with closing(share(crew, [partial(int, number) for number in range(50)])) as results:
            return list(results)

    jobs = [crew.submit(job) for _ in range(3)]
    assert [each.result(WAIT_S) for each in jobs] == [list(range(50))] * 3


def test_no_piece_runs_once_the_job_was_left(crew: Crew) -> None:
    is_helping, may_end, done = threading.Event(), threading.Event(), list[int]()

    def slow() -> int:
        is_helping.set()
        assert may_end.wait(WAIT_S)
        done.append(1)
        return 1

    def first() -> int:
        assert is_helping.wait(WAIT_S)  # whoever has this one, somebody else has the next
        return 0

    results = share(crew, [first, slow, *[partial(done.append, 2)] * 100])
    assert next(results) == 0
    threading.Timer(0.01, may_end.set).start()
    results.close()
    num_done = len(done)
    assert 1 in done
    crew.submit(int).result(WAIT_S)
    assert len(done) == num_done


def test_a_piece_that_fails_ends_the_job_and_is_told(crew: Crew) -> None:
    def fail() -> int:
        raise ValueError("piece 5")

    pieces = [partial(int, number) for number in range(5)] + [fail] + [partial(int, 6)] * 50
    with pytest.raises(ValueError, match="piece 5"), closing(share(crew, pieces)) as results:
        list(results)
    with closing(share(crew, pieces[:5])) as results:  # the crew is as good as before
        assert list(results) == list(range(5))


@pytest.mark.parametrize("row_bytes", [4096, 192 * 1024, 3 << 20])
def test_shared_checksums_and_copies_are_those_of_one_thread(crew: Crew, row_bytes: int) -> None:
    num_rows = 12
    data = np.random.default_rng(1).integers(0, 256, num_rows * row_bytes, np.uint8)
    source = Rows(cast(Any, bytearray(data.tobytes())), num_rows, row_bytes)
    ours = Rows(cast(Any, bytearray(num_rows * row_bytes)), num_rows, row_bytes)
    order = [7, 0, 1, 2, 3, 11, 10, 4, 5, 6, 8, 9]
    assert shared_checksums(crew, source, order) == source.checksums(order)
    pairs = [(row, to_row) for to_row, row in enumerate(order)]
    assert shared_copy(crew, ours, source, pairs) == source.checksums(order)
    assert [bytes(ours.row(to_row)) for _, to_row in pairs] == [bytes(source.row(row)) for row, _ in pairs]


def test_rows_that_are_hashed_with_the_interpreter_held_are_not_shared() -> None:
    assert in_pieces(range(512), 4096) == [range(512)]
    assert in_pieces(range(512), 64 * 1024) == [range(512)]
    assert len(in_pieces(range(80), 192 * 1024)) == 16
    assert in_pieces(range(3), 16 << 20) == [range(1), range(1, 2), range(2, 3)]
