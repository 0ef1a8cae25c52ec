"""A link that is slower than the machine's own: when its bytes arrive, and what that means for a handoff."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from helpers.kv_agents import COMPATIBILITY, Prompt, hand_over, options, running
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferError
from baton.kvtransfer.shape import LinkShape, ShapedLink
from baton.kvtransfer.transport.base import Arrival, Landed
from baton.kvtransfer.transport.frames import Blocks, FrameKind
from baton.kvtransfer.transport.shaper import ShapedTransport

BLOCK_BYTES = COMPATIBILITY.layout.block_bytes
FENCES = (b"a" * 16, b"b" * 16)


def test_bytes_come_one_after_the_other_and_each_is_late_by_the_latency() -> None:
    link = ShapedLink(LinkShape(bytes_per_s=100.0, latency_s=3.0))
    assert [link.arrival_s(100, now=10.0) for _ in range(3)] == [14.0, 15.0, 16.0]
    assert link.arrival_s(50, now=12.9) == 16.5  # the link is still busy until 13
    assert link.arrival_s(50, now=20.0) == 23.5  # idle time is not saved up


@pytest.mark.parametrize(("bytes_per_s", "latency_s"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, -1.0)])
def test_an_impossible_link_is_refused(bytes_per_s: float, latency_s: float) -> None:
    with pytest.raises(ValueError, match="a link of"):
        LinkShape(bytes_per_s, latency_s)


@dataclass
class FakeTimers:
    """A clock that is moved by hand."""

    now: float = 0.0
    waiting: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> Any:
        entry = (when, callback)
        self.waiting.append(entry)
        return FakeHandle(self, entry)

    def move_to(self, now: float) -> None:
        self.now = now
        for entry in [entry for entry in self.waiting if entry[0] <= now]:
            self.waiting.remove(entry)
            entry[1]()


@dataclass
class FakeHandle:
    timers: FakeTimers
    entry: tuple[float, Callable[[], None]]

    def cancel(self) -> None:
        self.timers.waiting.remove(self.entry)


class InstantTransport:
    """Blocks are there as soon as they are announced; ``outcome`` says which of them are right."""

    name, kind, is_inline = "instant", FrameKind.BLOCK_REFS, False
    attaching = None
    outcome = staticmethod(lambda arrival: Landed(tuple((index, 0) for index in arrival.blocks.indices)))

    def land(self, arrival: Arrival) -> None:
        arrival.ended(self.outcome(arrival))

    def stop(self, fence: bytes) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass
class Setup:
    """A link of one block a second, and what was reported over it: (fence, landed, corrupt, broken)."""

    timers: FakeTimers = field(default_factory=FakeTimers)
    inner: InstantTransport = field(default_factory=InstantTransport)
    told: list[tuple[bytes, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        link = ShapedLink(LinkShape(bytes_per_s=1.0))
        self.shaped = ShapedTransport(cast(Any, self.inner), link, 1, self.timers)

    def land(self, fence: bytes, *indices: int) -> None:
        def ended(landed: Landed) -> None:
            done = tuple(index for index, _ in landed.landed)
            self.told.append((fence, done, tuple(landed.corrupt), tuple(landed.broken)))

        count = len(indices)
        blocks = Blocks(indices, indices, (1,) * count, (0,) * count, indices)
        self.shaped.land(Arrival(fence, blocks, set(indices), None, lambda: None, ended))


def test_blocks_are_reported_when_the_link_would_have_brought_them() -> None:
    setup = Setup()
    setup.land(FENCES[0], 0, 1)
    setup.land(FENCES[1], 0)
    assert setup.told == []
    setup.timers.move_to(0.9)
    assert setup.told == []
    setup.timers.move_to(1.0)
    assert setup.told == [(FENCES[0], (0,), (), ())]
    setup.timers.move_to(3.5)
    assert setup.told[1:] == [(FENCES[0], (1,), (), ()), (FENCES[1], (0,), (), ())]
    assert setup.timers.waiting == []


def test_a_corrupt_block_took_its_time_too_and_a_broken_one_is_told_at_once() -> None:
    setup = Setup()
    setup.inner.outcome = lambda arrival: Landed(corrupt=(0,), broken=(1,))
    setup.land(FENCES[0], 0, 1)
    assert setup.told == [(FENCES[0], (), (), (1,))]
    setup.timers.move_to(1.0)
    assert setup.told[1:] == [(FENCES[0], (), (0,), ())]


async def test_a_handoff_that_is_stopped_waits_no_longer_and_every_block_is_told_once() -> None:
    setup = Setup()
    setup.land(FENCES[0], 0, 1)
    setup.land(FENCES[1], 0)
    setup.shaped.stop(FENCES[0])
    assert setup.told == [(FENCES[0], (0, 1), (), ())]
    await setup.shaped.close()
    assert setup.told[1:] == [(FENCES[1], (0,), (), ())]
    setup.timers.move_to(100.0)
    assert len(setup.told) == 2


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_a_handoff_takes_at_least_as_long_as_its_link(transport: str) -> None:
    shape = LinkShape(bytes_per_s=BLOCK_BYTES / 0.05, latency_s=0.05)
    async with (
        running("prefill-0", transports=transport) as sender,
        running("decode-0", transports=transport, options=options(link_shape=shape)) as receiver,
    ):
        sender.fill(1)
        begin = time.monotonic()
        prompt = Prompt([3, 5, 7])
        await hand_over(sender, receiver, prompt)
        assert time.monotonic() - begin >= 3 * 0.05 + 0.05
        for slot in receiver.host.slots[prompt.key]:
            assert receiver.block(slot.block_id) == sender.block(prompt.block_ids[slot.index])


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_an_abort_does_not_wait_for_a_slow_link_and_frees_every_slot(transport: str) -> None:
    shape = LinkShape(bytes_per_s=BLOCK_BYTES / 1000.0)
    async with (
        running("prefill-0", transports=transport) as sender,
        running("decode-0", transports=transport, options=options(link_shape=shape)) as receiver,
    ):
        num_free = len(receiver.host.free)
        prompt = Prompt([3, 5, 7])
        handing = asyncio.create_task(hand_over(sender, receiver, prompt))
        await eventually(lambda: receiver.agent.stats().num_receiving and sender.agent.stats().bytes_sent[transport])
        receiver.agent.forget(prompt.key)
        with pytest.raises(TransferError):
            await handing
        await eventually(lambda: len(receiver.host.free) == num_free)
