"""A link that is slower than this machine's own: lets one machine imitate real ratios of computing to transfer.

For tests, benchmarks and planning; off unless asked for. It works on the receiving side, with every transport: blocks land as
fast as they come, and are reported as landed when they would have, had they come over the link that is imitated. Until then
the handoff counts them as landing, so slots that are given up meanwhile are in quarantine, as on a slow link.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.shape import ShapedLink
from baton.kvtransfer.transport.base import Arrival, Landed, Offer, Source, Transport
from baton.kvtransfer.transport.stream import Payload

# Blocks that are due within so short a time are reported together.
_GRAIN_S = 0.001


class Timers(Protocol):
    """The part of an event loop that is needed here."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], None], /) -> asyncio.TimerHandle: ...


@dataclass(slots=True)
class _Due:
    """A block that is here, and when it may be told."""

    when_s: float
    arrival: Arrival
    landed: tuple[tuple[int, int], ...] = ()
    corrupt: tuple[int, ...] = ()


class ShapedTransport:
    """``inner``, with landings reported no sooner than ``link`` would have brought them."""

    def __init__(self, inner: Transport, link: ShapedLink, block_bytes: int, timers: Timers | None = None) -> None:
        self.name, self.kind, self.is_inline = inner.name, inner.kind, inner.is_inline
        self.attaching = inner.attaching
        self._inner = inner
        self._link = link
        self._block_bytes = block_bytes
        self._timers = timers
        self._due: deque[_Due] = deque()  # in the order of their times: there is one link
        self._timer: asyncio.TimerHandle | None = None

    def offer(self) -> SharedMemory | bytes | None:
        return self._inner.offer()

    def attach(self, offer: Offer) -> Source | None:
        return self._inner.attach(offer)

    def detach(self, source: Source) -> None:
        self._inner.detach(source)

    def land(self, arrival: Arrival) -> Payload | None:
        return self._inner.land(replace(arrival, ended=lambda landed: self._hold(arrival, landed)))

    def stop(self, fence: bytes) -> None:
        self._inner.stop(fence)
        stopped = [due for due in self._due if due.arrival.fence == fence]
        self._due = deque(due for due in self._due if due.arrival.fence != fence)
        _report(stopped)

    async def close(self) -> None:
        await self._inner.close()
        if self._timer is not None:
            self._timer.cancel()
        due, self._due = self._due, deque()
        _report(due)

    def _hold(self, arrival: Arrival, landed: Landed) -> None:
        """Takes what the transport says of blocks, to say it later. What broke needs no time."""
        now = self._clock.time()
        for block in landed.landed:
            self._due.append(_Due(self._link.arrival_s(self._block_bytes, now), arrival, landed=(block,)))
        for index in landed.corrupt:
            self._due.append(_Due(self._link.arrival_s(self._block_bytes, now), arrival, corrupt=(index,)))
        if landed.broken:
            arrival.ended(Landed(broken=landed.broken))
        self._arm()

    def _arm(self) -> None:
        if self._due and self._timer is None:
            self._timer = self._clock.call_at(self._due[0].when_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        until_s = self._clock.time() + _GRAIN_S
        due = []
        while self._due and self._due[0].when_s <= until_s:
            due.append(self._due.popleft())
        _report(due)
        self._arm()

    @property
    def _clock(self) -> Timers:
        return self._timers or asyncio.get_running_loop()


def _report(due: list[_Due] | deque[_Due]) -> None:
    """Tells what belongs to one frame together."""
    by_arrival: dict[int, list[_Due]] = {}
    for block in due:
        by_arrival.setdefault(id(block.arrival), []).append(block)
    for blocks in by_arrival.values():
        landed = tuple(entry for block in blocks for entry in block.landed)
        corrupt = tuple(index for block in blocks for index in block.corrupt)
        blocks[0].arrival.ended(Landed(landed, corrupt))
