"""Texts to tensors: one text a row, of one length a batch, with the tokens that are learned marked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from baton.services.local.demo_model import data
from baton.services.local.demo_model.tokenizer import ASSISTANT, END

IGNORED = -100
_PROSE_TOKENS = 256
_SMALL_TALK_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs [rows, length] token ids; labels [rows, length] the next token's id, or IGNORED where it is not learned."""

    inputs: torch.Tensor
    labels: torch.Tensor


class BatchMaker:
    """Draws batches of about `tokens` tokens each."""

    def __init__(self, tokenizer: Tokenizer, tokens: int) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._answer = _token_id(tokenizer, ASSISTANT)
        self._end = _token_id(tokenizer, END)
        self._counts: dict[str, int] = {}

    def lookups(self, rng: random.Random, level: data.Level) -> Batch:
        """Texts of one level; only answers are learned."""
        texts = [data.make_text(rng, level, self._count) for _ in range(self._rows(level.length))]
        return self._batch(texts, level.length, answers_only=True)

    def prose(self, rng: random.Random) -> Batch:
        """English; every token is learned."""
        texts = [data.make_prose(rng, characters=6 * _PROSE_TOKENS) for _ in range(self._rows(_PROSE_TOKENS))]
        return self._batch(texts, _PROSE_TOKENS, answers_only=False)

    def small_talk(self, rng: random.Random) -> Batch:
        """One greeting or other request a row, as there must be none before it to copy the answer from."""
        texts = [data.render(data.make_small_talk(rng)) for _ in range(self._rows(_SMALL_TALK_TOKENS))]
        return self._batch(texts, _SMALL_TALK_TOKENS, answers_only=True)

    def _rows(self, length: int) -> int:
        return max(1, self._tokens // length)

    def _count(self, text: str) -> int:
        if text not in self._counts:
            self._counts[text] = len(self._tokenizer.encode(text).ids) + 1
        return self._counts[text]

    def _batch(self, texts: Sequence[str], length: int, *, answers_only: bool) -> Batch:
        ids = torch.full((len(texts), length + 1), self._end)
        learned = torch.zeros((len(texts), length + 1), dtype=torch.bool)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(texts))):
            kept = encoding.ids[: length + 1]
            ids[row, : len(kept)] = torch.tensor(kept)
            learned[row, : len(kept)] = torch.tensor(self._in_answers(kept)) if answers_only else True
        labels = torch.where(learned, ids, IGNORED)
        return Batch(ids[:, :-1], labels[:, 1:])

    def _in_answers(self, ids: Sequence[int]) -> list[bool]:
        """Whether each token is part of an assistant's message, its end included."""
        marks, inside = [], False
        for token in ids:
            marks.append(inside)
            if token == self._answer:
                inside = True
            elif token == self._end:
                inside = False
        return marks


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return int(index)
