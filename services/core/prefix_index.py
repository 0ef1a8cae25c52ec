"""Who holds which blocks, as far as the gateway has heard. Stale knowledge costs a cache miss, never a wrong answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Holder:
    incarnation: str
    bit: int
    sequence: int = 0
    names: set[bytes] = field(default_factory=set)


class PrefixIndex:
    """Block name -> workers that hold it, fed by sequence-numbered KV events.

    A worker is one bit of an integer, so the holders of a name are one dictionary value however many workers there are.
    """

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}
        self._by_name: dict[bytes, int] = {}
        self._free_bits: list[int] = []

    def __len__(self) -> int:
        return len(self._by_name)

    def apply(
        self,
        worker_id: str,
        incarnation: str,
        sequence: int,
        stored: Iterable[bytes],
        removed: Iterable[bytes],
        *,
        snapshot: bool = False,
    ) -> bool:
        """Takes in one event message. False: messages before it were lost; ask the worker for a snapshot."""
        holder = self._holders.get(worker_id)
        if holder is None or holder.incarnation != incarnation:
            self.forget(worker_id)
            holder = self._holders[worker_id] = _Holder(incarnation, self._take_bit())
        is_next = sequence == holder.sequence + 1
        if snapshot:
            self._remove(holder, tuple(holder.names))
            is_next = True
        elif sequence <= holder.sequence:
            return True  # a repetition
        holder.sequence = sequence
        for name in stored:
            holder.names.add(name)
            self._by_name[name] = self._by_name.get(name, 0) | holder.bit
        self._remove(holder, removed)
        return is_next

    def forget(self, worker_id: str) -> None:
        """The worker is gone, and its cache with it."""
        holder = self._holders.pop(worker_id, None)
        if holder is not None:
            self._remove(holder, tuple(holder.names))
            self._free_bits.append(holder.bit)

    def matches(self, names: Sequence[bytes]) -> dict[str, int]:
        """For each worker that holds at least the first name: how many of the first names it holds without a gap."""
        counts: dict[str, int] = {}
        holding = -1
        for depth, name in enumerate(names):
            still = holding & self._by_name.get(name, 0)
            if depth and still != holding:
                self._record(counts, holding & ~still, depth)
            holding = still
            if not holding:
                return counts
        if names:
            self._record(counts, holding, len(names))
        return counts

    def _record(self, counts: dict[str, int], bits: int, depth: int) -> None:
        for worker_id, holder in self._holders.items():
            if holder.bit & bits:
                counts[worker_id] = depth

    def _remove(self, holder: _Holder, names: Iterable[bytes]) -> None:
        for name in names:
            if name not in holder.names:
                continue
            holder.names.discard(name)
            left = self._by_name[name] & ~holder.bit
            if left:
                self._by_name[name] = left
            else:
                del self._by_name[name]

    def _take_bit(self) -> int:
        return self._free_bits.pop() if self._free_bits else 1 << len(self._holders)
