"""Tokens of two workers in one order."""

from __future__ import annotations

import pytest

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError
from baton.services.core.request import FinishReason
from baton.services.gateway.token_order import TokenOrder


def output(
    first_index: int, *token_ids: int, finish: pb.FinishReason = pb.FINISH_REASON_UNSPECIFIED
) -> pb.RequestOutput:
    tokens = [pb.Token(token_id=token_id) for token_id in token_ids]
    return pb.RequestOutput(first_index=first_index, tokens=tokens, finish_reason=finish)


def test_an_output_that_is_too_early_waits_for_its_turn() -> None:
    order = TokenOrder(0)
    assert order.push(output(1, 11)) == []
    assert order.push(output(2, 12, 13, finish=pb.FINISH_REASON_LENGTH)) == []
    deltas = order.push(output(0, 10))
    assert [token.token_id for delta in deltas for token in delta.tokens] == [10, 11, 12, 13]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH]


def test_a_resumed_request_goes_on_where_it_was() -> None:
    order = TokenOrder(5)
    assert [delta.first_index for delta in order.push(output(5, 1))] == [5]


def test_an_end_without_tokens_waits_for_the_tokens_before_it() -> None:
    order = TokenOrder(0)
    assert order.push(output(1, finish=pb.FINISH_REASON_STOP)) == []
    assert [delta.finish_reason for delta in order.push(output(0, 9))] == [None, FinishReason.STOP]


def test_a_report_without_tokens_is_no_delta() -> None:
    assert TokenOrder(0).push(pb.RequestOutput(handed_over=True)) == []


def test_a_token_sent_twice_is_an_error() -> None:
    order = TokenOrder(0)
    order.push(output(0, 1))
    with pytest.raises(BatonError, match="token 0 again"):
        order.push(output(0, 1))
