"""The receiver's memory: a few blocks, who holds them, what they are called and what is really in them.

The block that was freed last is given out first, so that what goes wrong with reuse goes wrong at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from baton.kvtransfer.explorer.invariants import Invariant, Violation
from baton.kvtransfer.messages import Slot

NOBODY = -1
TORN = b"torn"
"""Content of a block that is being written, or was written wrongly."""


class Block(NamedTuple):
    """One block. Handoffs are numbers."""

    generation: int = 0
    transfer: int = NOBODY
    quarantine: int = NOBODY
    requests: frozenset[int] = frozenset()
    name: bytes = b""
    content: bytes = b""

    @property
    def is_reusable(self) -> bool:
        return self.transfer == NOBODY and self.quarantine == NOBODY and not self.requests


class Pool(NamedTuple):
    """An immutable pool; every operation gives a new one."""

    blocks: tuple[Block, ...]
    free: tuple[int, ...]  # without a name; the last one is given out next
    cached: tuple[int, ...]  # with a name and nobody to hold it; the first one is given out next

    @property
    def is_released(self) -> bool:
        return len(self.free) + len(self.cached) == len(self.blocks)

    def held_by(self, handoff: int) -> frozenset[tuple[int, int]]:
        """(block, generation) of what the transfer may write, or might still write."""
        return frozenset(
            (block_id, block.generation)
            for block_id, block in enumerate(self.blocks)
            if handoff in (block.transfer, block.quarantine)
        )


def empty(num_blocks: int) -> Pool:
    return Pool((Block(),) * num_blocks, tuple(reversed(range(num_blocks))), ())


def reserve(pool: Pool, handoff: int, names: Sequence[bytes]) -> tuple[Pool, tuple[Slot, ...]] | None:
    """Slots for what is not here, and a hold on what is. None: no room."""
    by_name = {block.name: block_id for block_id, block in enumerate(pool.blocks) if block.name}
    hits: list[int] = []
    for name in names:
        if name not in by_name:
            break
        hits.append(by_name[name])
    reusable = [block_id for block_id in (*reversed(pool.free), *pool.cached) if block_id not in hits]
    num_new = len(names) - len(hits)
    if num_new > len(reusable):
        return None
    blocks = list(pool.blocks)
    for block_id in hits:
        blocks[block_id] = blocks[block_id]._replace(requests=blocks[block_id].requests | {handoff})
    slots = []
    for index, block_id in enumerate(reusable[:num_new], start=len(hits)):
        generation = blocks[block_id].generation + 1
        blocks[block_id] = Block(generation, transfer=handoff, content=blocks[block_id].content)
        slots.append(Slot(index, block_id, generation))
    return _settled(pool, blocks), tuple(slots)


def write(pool: Pool, handoff: int, block_id: int, generation: int, content: bytes) -> Pool:
    """Bytes arrive in a block."""
    block = pool.blocks[block_id] if block_id < len(pool.blocks) else Block()
    if block.generation != generation or handoff not in (block.transfer, block.quarantine):
        raise Violation(
            Invariant.LATE_WRITE,
            f"handoff {handoff + 1} writes generation {generation} of block {block_id}, which is in {block}",
        )
    blocks = list(pool.blocks)
    blocks[block_id] = block._replace(content=content)
    return pool._replace(blocks=tuple(blocks))


def adopt(pool: Pool, handoff: int, slots: Iterable[Slot], names: Sequence[bytes]) -> Pool:
    """The transfer's blocks become the request's, readable under their names."""
    blocks = list(pool.blocks)
    taken = {block.name for block in blocks if block.name}
    for slot in slots:
        block, name = blocks[slot.block_id], names[slot.index]
        if block.transfer != handoff or block.generation != slot.generation:
            raise Violation(
                Invariant.OWNERSHIP, f"handoff {handoff + 1} adopts block {slot.block_id}, not its: {block}"
            )
        if block.content != name:
            raise Violation(Invariant.READABLE, f"block {slot.block_id} is called {name!r}, in it is {block.content!r}")
        blocks[slot.block_id] = block._replace(
            transfer=NOBODY, requests=block.requests | {handoff}, name=b"" if name in taken else name
        )
        taken.add(name)
    return _settled(pool, blocks)


def quarantine(pool: Pool, handoff: int, kept: Iterable[Slot], names: Sequence[bytes]) -> Pool:
    """The transfer gives up while a write can still come. What it ``kept`` is whole and becomes cache."""
    blocks = _keep(pool, handoff, kept, names)
    for block_id, block in enumerate(blocks):
        if block.transfer == handoff:
            blocks[block_id] = block._replace(transfer=NOBODY, quarantine=handoff)
    return _settled(pool, _without(blocks, handoff))


def release(pool: Pool, handoff: int, kept: Iterable[Slot], names: Sequence[bytes]) -> Pool:
    """The transfer gives up and nothing can be written any more."""
    blocks = _keep(pool, handoff, kept, names)
    for block_id, block in enumerate(blocks):
        if handoff in (block.transfer, block.quarantine):
            blocks[block_id] = block._replace(transfer=NOBODY, quarantine=NOBODY)
    return _settled(pool, _without(blocks, handoff))


def finish(pool: Pool, handoff: int) -> Pool:
    """The request is over; what has a name stays as cache."""
    return _settled(pool, _without(list(pool.blocks), handoff))


def _keep(pool: Pool, handoff: int, kept: Iterable[Slot], names: Sequence[bytes]) -> list[Block]:
    blocks = list(pool.blocks)
    taken = {block.name for block in blocks if block.name}
    for slot in kept:
        block, name = blocks[slot.block_id], names[slot.index]
        if block.transfer != handoff or block.generation != slot.generation:
            raise Violation(Invariant.OWNERSHIP, f"handoff {handoff + 1} keeps block {slot.block_id}, not its: {block}")
        if block.content != name:
            raise Violation(
                Invariant.READABLE, f"block {slot.block_id} is kept as {name!r}, in it is {block.content!r}"
            )
        blocks[slot.block_id] = block._replace(transfer=NOBODY, name=b"" if name in taken else name)
        taken.add(name)
    return blocks


def _without(blocks: list[Block], handoff: int) -> list[Block]:
    return [block._replace(requests=block.requests - {handoff}) if block.requests else block for block in blocks]


def _settled(pool: Pool, blocks: list[Block]) -> Pool:
    """Puts what became reusable behind the others of its list, tail of the chain first, and checks that it is one's only."""
    for block_id, block in enumerate(blocks):
        if (block.transfer != NOBODY) + (block.quarantine != NOBODY) + bool(block.requests) > 1:
            raise Violation(Invariant.OWNERSHIP, f"block {block_id} has two owners: {block}")
    reusable = [block_id for block_id, block in enumerate(blocks) if block.is_reusable]
    free = [block_id for block_id in pool.free if block_id in reusable and not blocks[block_id].name]
    cached = [block_id for block_id in pool.cached if block_id in reusable and blocks[block_id].name]
    for block_id in reversed(reusable):
        if blocks[block_id].name and block_id not in cached:
            cached.append(block_id)
        elif not blocks[block_id].name and block_id not in free:
            free.append(block_id)
    return Pool(tuple(blocks), tuple(free), tuple(cached))
