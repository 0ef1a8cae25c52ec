"""New tokens of one generation, and how the outputs of two workers become one sequence without a gap."""

from __future__ import annotations

from dataclasses import dataclass

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, SampledToken, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one generation. The last delta, and only that, has a finish reason."""

    first_index: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int | None = None  # in the first delta; a later one may know better
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # in the first delta, if asked for


class TokenOrder:
    """One attempt's tokens in order.

    The first token comes from the prefill worker, the rest from the decode worker over another stream, which can be
    faster: a delta waits until its turn. Tokens that were there already are an error.
    """

    def __init__(self, next_index: int) -> None:
        self._first_index = self._next_index = next_index
        self._waiting: dict[int, TokenDelta] = {}
        self._ended = False

    @property
    def has_begun(self) -> bool:
        """The first token is out."""
        return self._next_index > self._first_index

    def take_next(self, first_index: int, num_tokens: int) -> bool:
        """``push`` of tokens that end nothing, where they are the next and nothing waits for them. Else False."""
        if first_index != self._next_index or self._waiting or self._ended:
            return False
        self._next_index += num_tokens
        return True

    def push(self, delta: TokenDelta) -> list[TokenDelta]:
        """Takes in one delta and returns those whose turn has come."""
        if not delta.tokens and delta.finish_reason is None:
            return []
        if delta.first_index < self._next_index or delta.first_index in self._waiting:
            message = f"a worker sent token {delta.first_index} again; token {self._next_index} is next"
            raise BatonError(ErrorCode.INTERNAL, message)
        self._waiting[delta.first_index] = delta
        ready: list[TokenDelta] = []
        while not self._ended and (turn := self._waiting.pop(self._next_index, None)) is not None:
            ready.append(turn)
            self._next_index += len(turn.tokens)
            self._ended = turn.finish_reason is not None
            if not turn.tokens:
                break
        return ready
