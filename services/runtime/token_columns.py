"""Plain tokens of many requests in columns: what most messages of a decode worker are, and nearly all that they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode


class TokenRow(NamedTuple):
    """New tokens of one request, of which nothing but their ids is to be said."""

    handle: int  # the gateway's name for the attempt, on one stream
    first_index: int
    token_ids: list[int]


def columns_of(rows: Iterable[TokenRow]) -> pb.TokenColumns | None:
    """The message's columns; None for no row."""
    handles: list[int] = []
    first_indices: list[int] = []
    counts: list[int] = []
    token_ids: list[int] = []
    for row in rows:
        handles.append(row.handle)
        first_indices.append(row.first_index)
        counts.append(len(row.token_ids))
        token_ids += row.token_ids
    if not handles:
        return None
    if len(token_ids) == len(handles):
        counts = []
    return pb.TokenColumns(handles=handles, first_indices=first_indices, counts=counts, token_ids=token_ids)


def rows_of(columns: pb.TokenColumns) -> list[TokenRow]:
    """What the columns say. Raises BatonError (INTERNAL) where they do not fit each other: none of it can be trusted then."""
    handles, first_indices = columns.handles[:], columns.first_indices[:]
    counts, token_ids = columns.counts[:], columns.token_ids[:]
    if len(handles) != len(first_indices) or len(counts or token_ids) != len(handles):
        raise _contradiction(columns)
    if not counts:
        return list(map(TokenRow, handles, first_indices, [[token_id] for token_id in token_ids]))
    if sum(counts) != len(token_ids) or 0 in counts:
        raise _contradiction(columns)
    rows, start = [], 0
    for handle, first_index, count in zip(handles, first_indices, counts, strict=True):
        rows.append(TokenRow(handle, first_index, token_ids[start : start + count]))
        start += count
    return rows


def _contradiction(columns: pb.TokenColumns) -> BatonError:
    message = (
        f"columns of tokens do not fit each other: {len(columns.handles)} requests, {len(columns.first_indices)} indices, "
        f"{len(columns.counts)} counts (sum {sum(columns.counts)}), {len(columns.token_ids)} tokens"
    )
    return BatonError(ErrorCode.INTERNAL, message, retryable=True)
