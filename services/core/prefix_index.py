"""Who holds which blocks, as far as the gateway has heard. Stale knowledge costs a cache miss, never a wrong answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Up to so many blocks a prompt is walked block by block; a longer one is halved. A worker keeps a chain's head longer than its
# tail, so a hole in the middle of a long one is rare, and costs a miss.
_WALKED_BLOCKS = 16


@dataclass(slots=True)
class _Holder:
    incarnation: str
    slot: int
    bit: int
    sequence: int = 0
    names: set[bytes] = field(default_factory=set)


class Level(NamedTuple):
    """Workers that hold the first ``num_blocks`` of a prompt and not more: the bits of ``holders``."""

    num_blocks: int
    holders: int


class PrefixIndex:
    """Block name -> workers that hold it, fed by sequence-numbered KV events.

    A worker is one bit of an integer, so the holders of a name are one dictionary value however many workers there are.
    """

    def __init__(self) -> None:
        self.bits: dict[str, int] = {}
        """Worker id -> its bit, for those that have told of blocks."""
        self.worker_ids: list[str] = []
        """By the place of the bit; the last one that had it."""
        self.version = 0
        """Changes when a bit gets another worker."""
        self._holders: dict[str, _Holder] = {}
        self._by_name: dict[bytes, int] = {}
        self._free_slots: list[int] = []

    def __len__(self) -> int:
        return len(self._by_name)

    def apply(
        self,
        worker_id: str,
        incarnation: str,
        sequence: int,
        stored: Collection[bytes],
        removed: Iterable[bytes],
        *,
        snapshot: bool = False,
    ) -> bool:
        """Takes in one event message. False: messages before it were lost; ask the worker for a snapshot."""
        holder = self._holders.get(worker_id)
        if holder is None or holder.incarnation != incarnation:
            self.forget(worker_id)
            holder = self._holders[worker_id] = self._new_holder(worker_id, incarnation)
        is_next = sequence == holder.sequence + 1
        if snapshot:
            self._remove(holder, tuple(holder.names))
            is_next = True
        elif sequence <= holder.sequence:
            return True  # a repetition
        holder.sequence = sequence
        # In few calls for a whole message: a loop over its blocks would take twice as long.
        by_name, bit = self._by_name, holder.bit
        fresh = dict.fromkeys(stored, bit)
        others = with_it = 0
        for name in by_name.keys() & fresh.keys():
            held = by_name[name]
            if held is not others:
                others, with_it = held, held | bit
            fresh[name] = with_it  # neighbours mostly have the same holders: one integer for all of them
        by_name.update(fresh)
        holder.names.update(fresh)
        self._remove(holder, removed)
        return is_next

    def sequence(self, worker_id: str, incarnation: str) -> int:
        """Of the last message that was taken in; 0 before the first."""
        holder = self._holders.get(worker_id)
        return holder.sequence if holder is not None and holder.incarnation == incarnation else 0

    def forget(self, worker_id: str) -> None:
        """The worker is gone, and its cache with it."""
        holder = self._holders.pop(worker_id, None)
        if holder is not None:
            del self.bits[worker_id]
            self._remove(holder, tuple(holder.names))
            self._free_slots.append(holder.slot)

    def matches(self, names: Sequence[bytes]) -> dict[str, int]:
        """For each worker that holds at least the first name: how many of the first names it holds without a gap."""
        counts: dict[str, int] = {}
        for num_blocks, holders in self._walk(names):
            for worker_id in self.holders(holders):
                counts[worker_id] = num_blocks
        return counts

    def levels(self, names: Sequence[bytes], max_levels: int) -> list[Level]:
        """The holders of the longest prefixes, longest first, grouped by how long theirs is; at most ``max_levels`` groups.

        Of a long prompt a hole in the middle of what a worker holds may not be seen.
        """
        if len(names) <= _WALKED_BLOCKS:
            levels = self._walk(names)
            levels.reverse()
            return levels[:max_levels]
        return self._halve(names, max_levels)

    def deepest(self, names: Sequence[bytes]) -> tuple[int, int, int]:
        """The first of ``levels``, of no blocks where nobody holds the first one; and whoever holds that one."""
        known = self._by_name.get
        some = held = known(names[0], 0)
        if not held:
            return 0, 0, 0
        low, high = 1, len(names) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            there = known(names[middle - 1])
            if there is not None and (there is held or (there := there & held)):
                low, held = middle, there
            else:
                high = middle
        return low, held, some

    def deepest_of(self, names: Sequence[bytes], some: int, num_blocks: int) -> tuple[int, int]:
        """The same among those who hold the first block, but less than ``num_blocks``."""
        known = self._by_name.get
        low, high, held = 1, num_blocks, some
        while high - low > 1:
            middle = (low + high) >> 1
            there = known(names[middle - 1], 0) & held
            if there:
                low, held = middle, there
            else:
                high = middle
        return low, held

    def holding(self, names: Sequence[bytes], number: int) -> int:
        """Those that hold the block with this number, from 1 on, as bits."""
        return self._by_name.get(names[number - 1], 0)

    def depth(self, names: Sequence[bytes], bit: int) -> int:
        """How many of the first blocks one worker holds."""
        known = self._by_name.get
        if not known(names[0], 0) & bit:
            return 0
        low, high = 1, len(names) + 1
        while high - low > 1:
            middle = (low + high) >> 1
            if known(names[middle - 1], 0) & bit:
                low = middle
            else:
                high = middle
        return low

    def depth_of(self, names: Sequence[bytes], worker_id: str) -> int:
        """The same, of a worker that may never have told of blocks."""
        bit = self.bits.get(worker_id)
        return self.depth(names, bit) if bit and names else 0

    def holders(self, bits: int) -> Iterator[str]:
        """The workers behind the bits."""
        worker_ids = self.worker_ids
        while bits:
            last = bits & -bits
            yield worker_ids[last.bit_length() - 1]
            bits ^= last

    def _walk(self, names: Sequence[bytes]) -> list[Level]:
        """Shortest prefix first. Exact."""
        if not names:
            return []
        known = self._by_name.get
        last = holding = known(names[0], 0)
        if not holding:
            return []
        levels: list[Level] = []
        depth = 0
        for name in names:
            held = known(name, 0)
            if held is not last:
                last = held
                still = holding & held
                if still != holding:
                    levels.append(Level(depth, holding ^ still))
                    if not still:
                        return levels
                    holding = still
            depth += 1
        levels.append(Level(depth, holding))
        return levels

    def _halve(self, names: Sequence[bytes], max_levels: int) -> list[Level]:
        known = self._by_name.get
        left = known(names[0], 0)  # holders whose prefix is not known yet
        levels: list[Level] = []
        upper, upper_held = len(names), left & known(names[-1], 0)
        while left and len(levels) < max_levels:
            # Invariant: somebody of ``left`` holds block ``low - 1``; nobody of them ``high``, if that is within the prompt.
            if upper == len(names) and upper_held:
                low, held = upper, upper_held
            else:
                low, high, held = 1, upper, left
                while high - low > 1:
                    middle = (low + high) >> 1
                    there = left & known(names[middle - 1], 0)
                    if there:
                        low, held = middle, there
                    else:
                        high = middle
            levels.append(Level(low, held))
            left &= ~held
            upper, upper_held = low, 0
        return levels

    def _remove(self, holder: _Holder, names: Iterable[bytes]) -> None:
        own, by_name, bit = holder.names, self._by_name, holder.bit
        for name in names:
            if name not in own:
                continue
            own.discard(name)
            held = by_name[name]
            if held == bit:
                del by_name[name]
            else:
                by_name[name] = held ^ bit

    def _new_holder(self, worker_id: str, incarnation: str) -> _Holder:
        self.version += 1
        if self._free_slots:
            slot = self._free_slots.pop()
            self.worker_ids[slot] = worker_id
        else:
            slot = len(self.worker_ids)
            self.worker_ids.append(worker_id)
        self.bits[worker_id] = 1 << slot
        return _Holder(incarnation, slot, self.bits[worker_id])
