"""Sets of block indices as integers: bit i stands for block i. A count could agree by accident; a set cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_WORD_BITS = 512
_WORD = (1 << _WORD_BITS) - 1


def of(indices: Iterable[int]) -> int:
    """The set of these indices."""
    members = tuple(indices)
    if not members:
        return 0
    start, count = members[0], len(members)
    if members == tuple(range(start, start + count)):  # the usual case: blocks come in their order
        return first(count) << start
    bits = 0
    for index in members:
        bits |= 1 << index
    return bits


def first(num_blocks: int) -> int:
    """The set of the indices below ``num_blocks``."""
    return (1 << num_blocks) - 1


def indices(bits: int) -> Iterator[int]:
    """The members, ascending."""
    start = 0
    while bits:
        # A word at a time: every step over the whole number would cost its whole length.
        word = bits & _WORD
        while word:
            # A run at a time: blocks are mostly next to each other.
            lowest = (word & -word).bit_length() - 1
            run = word >> lowest
            length = (~run & (run + 1)).bit_length() - 1
            yield from range(start + lowest, start + lowest + length)
            word = (run >> length) << (lowest + length)
        bits >>= _WORD_BITS
        start += _WORD_BITS


def has(bits: int, index: int) -> bool:
    """Whether ``index`` is a member."""
    return bits >> index & 1 == 1
