"""What a transport is.

Blocks are announced in frames on one data-plane connection per pair of workers, whatever moves their bytes. A transport says
how an announced block gets from the sender's rows into the receiver's: following the frame inline (``tcp``), or taken by the
receiver out of memory that it can reach (``shm``). Its verbs: ``offer``, ``attach`` and ``detach`` for the pair, ``land`` and
``stop`` for blocks, ``close``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Protocol

from baton.kvtransfer.mapping import SharedMemory
from baton.kvtransfer.transport.frames import Blocks, FrameKind
from baton.kvtransfer.transport.stream import Payload


@dataclass(frozen=True, slots=True)
class Offer:
    """What a sender tells in the handshake about itself."""

    host_id: str
    shared: SharedMemory | None
    tickets: Mapping[str, bytes] = field(
        default_factory=dict
    )  # transport -> what its ``attach`` needs, in its own format


class Source(Protocol):
    """The sender's rows, as the receiver reaches them."""

    num_rows: int


@dataclass(frozen=True, slots=True)
class Landed:
    """How writes ended, by index of their blocks."""

    landed: Sequence[tuple[int, int]] = ()  # (index, checksum) of our own copy, equal to the announced one
    corrupt: Sequence[int] = ()
    broken: Sequence[int] = ()


@dataclass(slots=True)
class Arrival:
    """The blocks of one frame, checked against the grant."""

    fence: bytes
    blocks: Blocks
    allowed: set[int]  # indices that may land; the others' bytes are dropped
    source: Source | None  # the sender's rows, where ``attach`` gave some
    resume: Callable[[], None]  # the stream may go on reading
    ended: Callable[[Landed], None] = field(repr=False)  # on the event loop; every allowed index once, in any grouping


class Transport(Protocol):
    """One way of moving blocks, for both directions of one worker. Lives on the event loop.

    ``attaching``: where ``attach`` and ``detach`` run, since they ask a library or a driver, which can take its time. None:
    they take none, and run on the event loop. Callers use the functions ``attach`` and ``detach`` of this module.
    """

    attaching: Executor | None

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> FrameKind:
        """Of the frames that announce its blocks."""
        ...

    @property
    def is_inline(self) -> bool:
        """Their bytes follow the frame; else the sender keeps its rows until the verdict."""
        ...

    def offer(self) -> SharedMemory | bytes | None:
        """Sender: what the receiver needs to know to ``attach``. Bytes come back in ``Offer.tickets``."""
        ...

    def attach(self, offer: Offer) -> Source | None:
        """Receiver: makes sure that blocks can come this way, and returns the rows they are taken from, if they are.

        What the sender says is checked here, before anything is opened or taken. Raises TransferError with the reason why not.
        """
        ...

    def detach(self, source: Source) -> None:
        """Receiver: the pair is over. Lets go of what ``attach`` gave, once nothing lands from it any more."""
        ...

    def land(self, arrival: Arrival) -> Payload | None:
        """Receiver: brings the allowed blocks into their slots. Returns who reads what follows the frame, if anything does."""
        ...

    def stop(self, fence: bytes) -> None:
        """Receiver: ends the landings of a handoff as soon as can be; each is still reported."""
        ...

    async def close(self) -> None:
        """Ends every landing and returns when none is left."""
        ...


async def attach(transport: Transport, offer: Offer) -> Source | None:
    """``transport.attach`` where it belongs. What it gives to a caller that has been cancelled meanwhile is let go."""
    if transport.attaching is None:
        return transport.attach(offer)
    running = transport.attaching.submit(transport.attach, offer)
    try:
        return await asyncio.wrap_future(running)
    except asyncio.CancelledError:
        if not running.cancelled():
            running.add_done_callback(lambda done: _detach_late(transport, done))
        raise


def detach(transport: Transport, source: Source) -> None:
    """``transport.detach`` where it belongs, after whatever is running there."""
    if transport.attaching is not None:
        try:
            transport.attaching.submit(transport.detach, source)
        except RuntimeError:  # it was closed: nothing runs there any more
            pass
        else:
            return
    transport.detach(source)


def _detach_late(transport: Transport, done: Future[Source | None]) -> None:
    if done.exception() is None and (source := done.result()) is not None:
        transport.detach(source)
