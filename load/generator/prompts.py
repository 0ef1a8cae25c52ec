"""Prompts of a wanted length that share what they should share. Pure: everything follows from the seed.

A prompt is a sequence of units: words, or token ids. It is put together from blocks that are drawn from a seed and a name, so
that equal names give equal units, in this run and in the next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

U = TypeVar("U", str, int)

_MAX_CACHED_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Vocabulary(Generic[U]):
    """What prompts are made of, and how many tokens the server counts for n units: ``overhead + n * tokens_per_unit``."""

    units: Sequence[U]
    tokens_per_unit: float = 1.0
    overhead: float = 0.0  # tokens of the chat template, or the one that begins a text

    def num_units(self, num_tokens: int) -> int:
        """Units for a prompt of about ``num_tokens``; at least one."""
        return max(1, round((num_tokens - self.overhead) / self.tokens_per_unit))


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt: the first ``num_tokens`` of the block with this name."""

    name: Hashable
    num_tokens: int


def block_parts(hash_ids: Sequence[int], block_size: int, num_tokens: int) -> list[Part]:
    """A trace's blocks as parts; the last one is cut to what is left of ``num_tokens``."""
    parts = []
    for hash_id in hash_ids:
        size = min(block_size, num_tokens)
        if size <= 0:
            break
        parts.append(Part(("block", hash_id), size))
        num_tokens -= size
    return parts


class PromptMaker(Generic[U]):
    """Units for parts. Blocks that come again are drawn once."""

    def __init__(self, vocabulary: Vocabulary[U], seed: int) -> None:
        self._vocabulary: Vocabulary[U] = vocabulary
        self._seed = seed
        self._draw: Callable[[Hashable, int], tuple[U, ...]] = lru_cache(_MAX_CACHED_BLOCKS)(self._draw_block)

    def units(self, parts: Sequence[Part]) -> list[U]:
        """The units of all parts in order.

        The whole has the units for its number of tokens, less the overhead, which comes off the last parts: what two
        prompts share at their beginning they still share.
        """
        units: list[U] = []
        per_unit = self._vocabulary.tokens_per_unit
        num_tokens = 0
        for part in parts:
            before = round(num_tokens / per_unit)
            num_tokens += part.num_tokens
            units += self._draw(part.name, round(num_tokens / per_unit) - before)
        wanted = self._vocabulary.num_units(num_tokens)
        if len(units) < wanted:
            units += self._draw(("more", parts[-1].name), wanted - len(units))
        del units[wanted:]
        return units

    def _draw_block(self, name: Hashable, count: int) -> tuple[U, ...]:
        # A text as seed is hashed by a fixed function, unlike a tuple, which differs from process to process.
        rng = random.Random(f"{self._seed}/{name!r}")
        return tuple(rng.choices(self._vocabulary.units, k=count))
