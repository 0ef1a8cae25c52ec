"""How a schedule becomes tensors."""

from __future__ import annotations

import torch
from helpers.engine_driver import make_request

from baton.services.core.request import Request
from baton.services.core.scheduler.base import ScheduledRequest
from baton.services.engine.batch import BatchBuilder

CPU = torch.device("cpu")


def request_at(computed: int, total: int, block_table: list[int]) -> Request:
    request = make_request(range(100, 100 + total))
    request.num_computed_tokens = computed
    request.block_table = block_table
    return request


def test_decodes_come_first_then_chunks() -> None:
    chunk = request_at(3, 20, [9, 4, 7, 2, 5])  # block size 4
    decode = request_at(5, 6, [8, 1])
    batch, plan = BatchBuilder(4, CPU).build([ScheduledRequest(chunk, 6), ScheduledRequest(decode, 1)])
    assert batch.token_ids.tolist() == [105, 103, 104, 105, 106, 107, 108]
    assert batch.positions.tolist() == [5, 3, 4, 5, 6, 7, 8]
    assert batch.slot_mapping.tolist() == [1 * 4 + 1, 9 * 4 + 3, 16, 17, 18, 19, 28]
    assert batch.rows.block_tables.tolist() == [[8, 1, 0, 0, 0], [9, 4, 7, 2, 5]]
    assert batch.rows.seq_lens.tolist() == [6, 9]
    assert batch.rows.cu_seqlens.tolist() == [0, 6]
    assert (batch.rows.num_decodes, batch.rows.num_rows, batch.max_seq_len) == (1, 7, 9)
    assert plan.sampled == [decode]
    assert batch.output_rows is not None
    assert batch.output_rows.tolist() == [0]
    assert batch.last_layer_rows.block_tables.tolist() == [[8, 1, 0, 0, 0]]
    assert batch.last_layer_rows.seq_lens.tolist() == [6]


def test_output_rows_are_the_ends_of_finished_chunks() -> None:
    done, going_on = request_at(0, 5, [1, 2]), request_at(0, 9, [3, 4, 5])
    last = request_at(2, 6, [6, 7])
    builder = BatchBuilder(4, CPU)
    batch, plan = builder.build([ScheduledRequest(done, 5), ScheduledRequest(going_on, 4), ScheduledRequest(last, 4)])
    assert plan.sampled == [done, last]
    assert batch.output_rows is not None
    assert batch.output_rows.tolist() == [4, 12]
    assert batch.last_layer_rows.seq_lens.tolist() == [5, 6]


def test_all_decodes_need_no_selection() -> None:
    batch, plan = BatchBuilder(4, CPU).build([ScheduledRequest(request_at(3, 4, [5]), 1)])
    assert batch.output_rows is None
    assert batch.last_layer_rows is batch.rows
    assert plan.sampled_outputs is None


def test_block_tables_are_followed_through_every_change() -> None:
    """Grown, replaced after a preemption, shrunk, edited in place."""
    builder = BatchBuilder(4, CPU)
    request, other = request_at(3, 4, [5]), request_at(3, 4, [6, 7, 8])
    for table in ([5], [5, 9], [2, 3, 4], [2], [1], [2, 3]):
        request.block_table[:] = table
        batch, _ = builder.build([ScheduledRequest(request, 1), ScheduledRequest(other, 1)])
        assert batch.rows.block_tables.tolist() == [table + [0] * (3 - len(table)), [6, 7, 8]]
