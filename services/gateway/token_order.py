"""Puts the outputs of two workers into one gap-free sequence of tokens."""

from __future__ import annotations

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.generation import TokenDelta
from baton.services.runtime import convert


class TokenOrder:
    """One request's tokens in order.

    The first token comes from the prefill worker, the rest from the decode worker over another stream, which can be
    faster: an output waits until its turn. Tokens that were there already are an error.
    """

    def __init__(self, next_index: int) -> None:
        self._first_index = self._next_index = next_index
        self._waiting: dict[int, pb.RequestOutput] = {}
        self._ended = False

    @property
    def has_begun(self) -> bool:
        """The first token is out."""
        return self._next_index > self._first_index

    def push(self, output: pb.RequestOutput) -> list[TokenDelta]:
        """Takes in one output and returns the deltas whose turn has come."""
        if not output.tokens and not output.finish_reason:
            return []
        if output.first_index < self._next_index:
            message = f"a worker sent token {output.first_index} again; token {self._next_index} is next"
            raise BatonError(ErrorCode.INTERNAL, message)
        self._waiting[output.first_index] = output
        ready: list[TokenDelta] = []
        while not self._ended and (turn := self._waiting.pop(self._next_index, None)) is not None:
            ready.append(_delta(turn))
            self._next_index += len(turn.tokens)
            self._ended = ready[-1].finish_reason is not None
            if not turn.tokens:
                break
        return ready


def _delta(output: pb.RequestOutput) -> TokenDelta:
    prompt = tuple(convert.logprobs_from_wire(token) for token in output.prompt_tokens)
    return TokenDelta(
        first_index=output.first_index,
        tokens=tuple(convert.token_from_wire(token) for token in output.tokens),
        finish_reason=convert.finish_reason_from_wire(output.finish_reason),
        stop_token_id=output.stop_token_id if output.HasField("stop_token_id") else None,
        cached_tokens=output.prefill.cached_tokens if output.HasField("prefill") else None,
        prompt_logprobs=prompt or None,
    )
