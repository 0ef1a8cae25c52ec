"""Which handoffs a receiver was told to expect, and from whom. A reservation may come a little before its announcement."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.kvtransfer.errors import Fenced, TransferCode, TransferError
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity

# Requests and handoffs whose end is remembered, so that a late message hears so at once instead of waiting.
_MAX_REMEMBERED = 8192


@dataclass(frozen=True, slots=True)
class Expectation:
    """A handoff that was announced. ``deadline_s`` is when its request is worth nothing, on the agent's clock."""

    sender: WorkerIdentity
    deadline_s: float | None


@dataclass
class Expectations:
    """``wait_s``: how long a reservation waits for its announcement; ``max_waiting``: how many may."""

    wait_s: float
    max_waiting: int
    clock: Callable[[], float]
    _expected: dict[HandoffKey, Expectation] = field(default_factory=dict)
    _newest: OrderedDict[str, int] = field(default_factory=OrderedDict)  # request id -> newest attempt announced
    _forgotten: OrderedDict[HandoffKey, None] = field(default_factory=OrderedDict)
    _waiting: dict[HandoffKey, set[asyncio.Event]] = field(default_factory=dict)
    _num_waiting: int = 0

    def expect(self, key: HandoffKey, sender: WorkerIdentity, deadline_s: float | None) -> None:
        """Announces a handoff. Older attempts at the request are stale from now on."""
        self._drop_overdue()
        self._expected[key] = Expectation(sender, deadline_s)
        self._forgotten.pop(key, None)
        newest = max(key.attempt, self._newest.pop(key.request_id, 0))
        self._newest[key.request_id] = newest
        self._trim(self._newest)
        self._wake(key)

    def forget(self, key: HandoffKey) -> None:
        """The handoff is over, or no longer wanted."""
        self._expected.pop(key, None)
        self._forgotten[key] = None
        self._trim(self._forgotten)
        self._wake(key)

    async def wait_for(self, handoff: HandoffId) -> Expectation:
        """The announcement of ``handoff``. Raises TransferError if it is not wanted, stale, or not announced in time."""
        expectation = self._find(handoff)
        if expectation is not None:
            return expectation
        if self._num_waiting >= self.max_waiting:
            raise TransferError(
                TransferCode.NO_CAPACITY, f"{self._num_waiting} reservations wait for their announcement"
            )
        arrived = asyncio.Event()
        self._waiting.setdefault(handoff.key, set()).add(arrived)
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self.wait_s):
                await arrived.wait()
        except TimeoutError:
            pass
        finally:
            self._num_waiting -= 1
            waiting = self._waiting.get(handoff.key, set())
            waiting.discard(arrived)
            if not waiting:
                self._waiting.pop(handoff.key, None)
        expectation = self._find(handoff)
        if expectation is None:
            raise TransferError(
                TransferCode.UNKNOWN_HANDOFF, f"{handoff.key} was not announced within {self.wait_s:g} s"
            )
        return expectation

    def _find(self, handoff: HandoffId) -> Expectation | None:
        key = handoff.key
        expectation = self._expected.get(key)
        if expectation is not None:
            if expectation.sender != handoff.sender:
                raise Fenced(f"{key} is expected from {expectation.sender}, not from {handoff.sender}")
            return expectation
        if key in self._forgotten:
            raise TransferError(TransferCode.ABORTED, f"{key} is over here")
        newest = self._newest.get(key.request_id, 0)
        if newest > key.attempt:
            raise Fenced(f"attempt {key.attempt} of {key.request_id} is stale: attempt {newest} was announced")
        return None

    def _wake(self, key: HandoffKey) -> None:
        for arrived in self._waiting.get(key, ()):
            arrived.set()

    def _drop_overdue(self) -> None:
        """Announcements are in the order of their arrival, so the old ones are looked at first."""
        now = self.clock()
        while self._expected:
            key, oldest = next(iter(self._expected.items()))
            if oldest.deadline_s is None or oldest.deadline_s > now:
                return
            del self._expected[key]

    @staticmethod
    def _trim(remembered: OrderedDict[HandoffKey, None] | OrderedDict[str, int]) -> None:
        while len(remembered) > _MAX_REMEMBERED:
            remembered.popitem(last=False)
