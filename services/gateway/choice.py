"""One choice on its way out: token deltas become text, stop strings end it, and what is left over is held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, SampledToken, TokenLogprobs
from baton.services.core.stop import StopChecker
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.detokenizer import Detokenizer
from baton.services.gateway.parts import Part


class OutputToken(NamedTuple):
    """A generated token and its place in the text. ``data`` is what it contributed; nothing for a hidden token."""

    sampled: SampledToken
    data: bytes
    text_offset: int  # characters of the choice's text before it, not counting an echoed prompt


class ChoicePiece(NamedTuple):
    """What is new in one choice. The first piece of a choice has ``is_first``, the last one a finish reason."""

    choice_index: int
    text: str
    num_tokens: int
    tokens: tuple[OutputToken, ...]  # those; none where nobody asked for more than their text
    is_first: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # in the first piece, if asked for
    prompt_text: str = ""  # in the first piece, if it is echoed
    parts: tuple[Part, ...] | None = None  # what the text says, where it is more than content
    texts: tuple[str, ...] = ()  # the text in the pieces in which it came, each of one token as a rule


class ChoiceAssembler:
    """Feed it the deltas of one generation, in order. Pure: no clock, no I/O.

    ``hidden_end_ids``: end-of-sequence tokens, whose text is not shown where they end the choice, even if the vocabulary
    does not mark them as special. ``shows_tokens``: pieces have tokens, not their text alone.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        hidden_end_ids: frozenset[int] = frozenset(),
        shows_tokens: bool = True,
    ) -> None:
        self._index = index
        self._shows_tokens = shows_tokens
        self._detokenizer = detokenizer
        self._stop = StopChecker(stop, include_stop) if stop else None
        self._min_tokens = min_tokens
        self._hidden_end_ids = hidden_end_ids
        self._num_chars = 0
        self._has_started = False
        self.num_tokens = 0

    def feed(self, delta: TokenDelta) -> ChoicePiece:
        """The piece that a delta makes.

        A finish reason in the piece but not in the delta is a stop string: the generation itself goes on and must be closed.
        """
        self._check_order(delta.first_index)
        if self._stop is None and delta.finish_reason is None and self._has_started:
            return self._feed_plain(delta.tokens)
        is_first, self._has_started = not self._has_started, True
        texts: list[str] = []
        tokens: list[OutputToken] = []
        matched: str | None = None
        last = len(delta.tokens) - 1 if delta.finish_reason is FinishReason.STOP else None
        for position, token in enumerate(delta.tokens):
            if position == last and token.token_id in self._hidden_end_ids:
                text, data = "", b""
            else:
                text = self._detokenizer.push(token.token_id)
                data = self._detokenizer.last_piece
            tokens.append(OutputToken(token, data, self._num_chars))
            self._num_chars += len(text)
            self.num_tokens += 1
            matched = self._emit(text, texts)
            if matched is not None:
                break
        finish_reason: str | None = None
        if matched is None and delta.finish_reason is not None:
            finish_reason = delta.finish_reason.value
            matched = self._emit(self._detokenizer.flush(), texts)
            if matched is None and self._stop is not None:
                texts.append(self._stop.flush())
        return ChoicePiece(
            self._index,
            "".join(texts),
            len(tokens),
            tuple(tokens) if self._shows_tokens else (),
            is_first,
            finish_reason if matched is None else FinishReason.STOP.value,
            delta.stop_token_id if matched is None else matched,
            delta.prompt_logprobs if is_first else None,
            self._detokenizer.prompt_text if is_first else "",
            texts=tuple(texts),
        )

    def feed_row(self, first_index: int, token_ids: Sequence[int]) -> ChoicePiece:
        """``feed`` of tokens in the middle of a generation of which there is nothing but their ids."""
        if self._shows_tokens or self._stop is not None or not self._has_started:
            return self.feed(TokenDelta(first_index, tuple(map(SampledToken, token_ids))))
        self._check_order(first_index)
        self.num_tokens += len(token_ids)
        return self._piece_of_texts(token_ids)

    def _check_order(self, first_index: int) -> None:
        if first_index != self.num_tokens:
            message = f"tokens from index {first_index} on, expected {self.num_tokens}"
            raise BatonError(ErrorCode.INTERNAL, message)

    def _piece_of_texts(self, token_ids: Sequence[int]) -> ChoicePiece:
        texts = self._detokenizer.push_each(token_ids)
        if len(texts) == 1:
            return ChoicePiece(self._index, texts[0], 1, (), texts=(texts[0],))
        return ChoicePiece(self._index, "".join(texts), len(texts), (), texts=tuple(texts))

    def _feed_plain(self, tokens: tuple[SampledToken, ...]) -> ChoicePiece:
        """``feed`` for nearly all deltas: tokens in the middle of a generation without stop strings."""
        self.num_tokens += len(tokens)
        detokenizer = self._detokenizer
        if not self._shows_tokens:
            return self._piece_of_texts([token.token_id for token in tokens])
        num_chars = self._num_chars
        texts = []
        outputs: list[OutputToken] = []
        for token in tokens:
            text = detokenizer.push(token.token_id)
            outputs.append(OutputToken(token, detokenizer.last_piece, num_chars))
            texts.append(text)
            num_chars += len(text)
        self._num_chars = num_chars
        return ChoicePiece(self._index, "".join(texts), len(tokens), tuple(outputs), texts=tuple(texts))

    def _emit(self, text: str, texts: list[str]) -> str | None:
        """Adds what of ``text`` may be shown now; returns the stop string that it completed."""
        if self._stop is None or self.num_tokens <= self._min_tokens:
            texts.append(text)
            return None
        result = self._stop.feed(text)
        texts.append(result.text)
        return result.matched
