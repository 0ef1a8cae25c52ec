"""Tokens of many requests in columns come out as they went in, and columns that do not fit each other are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.runtime.token_columns import TokenRow, columns_of, rows_of

numbers = st.integers(0, 2**32 - 1)
rows = st.builds(TokenRow, numbers, numbers, st.lists(numbers, min_size=1, max_size=5))


@given(rows=st.lists(rows, min_size=1))
def test_rows_come_back(rows: list[TokenRow]) -> None:
    columns = columns_of(rows)
    assert columns is not None
    assert rows_of(pb.TokenColumns.FromString(columns.SerializeToString())) == rows


def test_no_row_is_no_columns() -> None:
    assert columns_of([]) is None
    assert rows_of(pb.TokenColumns()) == []


def test_one_token_each_needs_no_counts() -> None:
    columns = columns_of([TokenRow(1, 5, [50]), TokenRow(2, 6, [60])])
    assert columns is not None
    assert not columns.counts


@pytest.mark.parametrize(
    "columns",
    [
        pb.TokenColumns(handles=[1, 2], first_indices=[0], token_ids=[7, 8]),
        pb.TokenColumns(handles=[1], first_indices=[0, 0], token_ids=[7]),
        pb.TokenColumns(handles=[1, 2], first_indices=[0, 0], token_ids=[7]),
        pb.TokenColumns(handles=[1], first_indices=[0], token_ids=[7, 8]),
        pb.TokenColumns(handles=[1], first_indices=[0]),
        pb.TokenColumns(token_ids=[7]),
        pb.TokenColumns(counts=[1], token_ids=[7]),
        pb.TokenColumns(handles=[1, 2], first_indices=[0, 0], counts=[2], token_ids=[7, 8]),
        pb.TokenColumns(handles=[1, 2], first_indices=[0, 0], counts=[1, 2], token_ids=[7, 8]),
        pb.TokenColumns(handles=[1, 2], first_indices=[0, 0], counts=[1, 1], token_ids=[7, 8, 9]),
        pb.TokenColumns(handles=[1, 2], first_indices=[0, 0], counts=[2, 0], token_ids=[7, 8]),
        pb.TokenColumns(handles=[1], first_indices=[0], counts=[2**32 - 1], token_ids=[7]),
    ],
)
def test_columns_that_do_not_fit_each_other_are_refused(columns: pb.TokenColumns) -> None:
    with pytest.raises(BatonError, match="do not fit each other") as failure:
        rows_of(columns)
    assert failure.value.code is ErrorCode.INTERNAL


@given(
    st.lists(numbers, max_size=4),
    st.lists(numbers, max_size=4),
    st.lists(numbers, max_size=4),
    st.lists(numbers, max_size=9),
)
def test_no_columns_do_more_than_be_refused(
    handles: list[int], first_indices: list[int], counts: list[int], token_ids: list[int]
) -> None:
    columns = pb.TokenColumns(handles=handles, first_indices=first_indices, counts=counts, token_ids=token_ids)
    try:
        read = rows_of(columns)
    except BatonError:
        return
    assert [row.handle for row in read] == handles
    assert [token_id for row in read for token_id in row.token_ids] == token_ids
    assert all(row.token_ids for row in read)
