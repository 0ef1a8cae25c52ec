"""Tokens of two workers in one order."""

from __future__ import annotations

import pytest

from baton.services.core.errors import BatonError
from baton.services.core.request import FinishReason, SampledToken
from baton.services.core.token_order import TokenDelta, TokenOrder


def delta(first_index: int, *token_ids: int, finish: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(first_index, tuple(map(SampledToken, token_ids)), finish)


def test_an_output_that_is_too_early_waits_for_its_turn() -> None:
    order = TokenOrder(0)
    assert order.push(delta(1, 11)) == []
    assert order.push(delta(2, 12, 13, finish=FinishReason.LENGTH)) == []
    deltas = order.push(delta(0, 10))
    assert [token.token_id for each in deltas for token in each.tokens] == [10, 11, 12, 13]
    assert [each.finish_reason for each in deltas] == [None, None, FinishReason.LENGTH]


def test_a_resumed_request_goes_on_where_it_was() -> None:
    order = TokenOrder(5)
    assert [each.first_index for each in order.push(delta(5, 1))] == [5]


def test_an_end_without_tokens_waits_for_the_tokens_before_it() -> None:
    order = TokenOrder(0)
    assert order.push(delta(1, finish=FinishReason.STOP)) == []
    assert [each.finish_reason for each in order.push(delta(0, 9))] == [None, FinishReason.STOP]


def test_a_report_without_tokens_is_no_delta() -> None:
    assert TokenOrder(0).push(delta(0)) == []


def test_a_token_sent_twice_is_an_error() -> None:
    order = TokenOrder(0)
    order.push(delta(0, 1))
    with pytest.raises(BatonError, match="token 0 again"):
        order.push(delta(0, 1))


def test_a_token_sent_twice_before_its_turn_is_an_error_too() -> None:
    order = TokenOrder(0)
    order.push(delta(3, 1))
    with pytest.raises(BatonError, match="token 3 again"):
        order.push(delta(3, 1))
