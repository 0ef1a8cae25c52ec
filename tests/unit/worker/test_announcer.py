"""What workers tell the bus: numbered, in order, soon, and nothing after the farewell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.api.events.v1 import events_pb2
from baton.services.core.prefix_index import PrefixIndex
from baton.services.runtime.bus import InProcessBus
from baton.services.runtime.subjects import Subjects
from baton.services.worker.announcer import MAX_NAMES_PER_MESSAGE, MIN_PAUSE_S, Announcer

SUBJECTS = Subjects("test")
IDENTITY = pb.WorkerIdentity(worker_id="w", incarnation="i")


class Listener:
    """An announcer and what a gateway hears of it."""

    def __init__(self) -> None:
        self.bus = InProcessBus()
        self.announcements: list[events_pb2.WorkerAnnouncement] = []
        self.kv: list[events_pb2.KVEvents] = []
        self.bus.subscribe(
            SUBJECTS.all_workers,
            lambda subject, payload: self.announcements.append(events_pb2.WorkerAnnouncement.FromString(payload)),
        )
        self.bus.subscribe(
            SUBJECTS.all_kv, lambda subject, payload: self.kv.append(events_pb2.KVEvents.FromString(payload))
        )
        self.names: tuple[bytes, ...] = ()
        self.replaced: list[str] = []
        self.announcer = Announcer(
            self.bus,
            SUBJECTS,
            IDENTITY,
            status=lambda: pb.WorkerStatus(identity=IDENTITY, started_ms=1000),
            collect_names=self._collect,
            on_replaced=self.replaced.append,
        )

    def _collect(self, take: Callable[[Sequence[bytes]], None]) -> None:
        asyncio.get_running_loop().call_soon(take, self.names)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def test_it_introduces_itself_and_answers_who_asks() -> None:
    listener = Listener()
    task = asyncio.create_task(listener.announcer.run())
    await eventually(lambda: listener.announcements and listener.kv)
    assert listener.kv[0].snapshot
    num_before = len(listener.announcements)
    listener.bus.publish(SUBJECTS.discover, b"")
    await eventually(lambda: len(listener.announcements) == num_before + 1)
    assert [a.sequence for a in listener.announcements] == list(range(1, num_before + 2))
    task.cancel()


async def test_events_are_numbered_without_gaps_across_messages_and_snapshots() -> None:
    listener = Listener()
    names = [name(number) for number in range(2 * MAX_NAMES_PER_MESSAGE + 1)]
    listener.names = tuple(names)
    listener.announcer.blocks_changed(names, names[:1])
    listener.bus.publish(SUBJECTS.kv_snapshot("w"), b"")
    await eventually(lambda: len(listener.kv) == 6)
    assert [events.sequence for events in listener.kv] == [1, 2, 3, 4, 5, 6]
    assert [events.snapshot for events in listener.kv] == [False, False, False, True, False, False]
    assert [name for events in listener.kv[:3] for name in events.stored] == names
    assert [name for events in listener.kv[3:] for name in events.stored] == names
    assert listener.announcer.kv_sequence == 6


async def test_a_listener_that_missed_events_is_right_after_the_snapshot() -> None:
    listener = Listener()
    listener.announcer.blocks_changed([name(1), name(2)], [])
    listener.announcer.blocks_changed([name(3)], [name(1)])
    listener.names = (name(2), name(3))
    listener.bus.publish(SUBJECTS.kv_snapshot("w"), b"")
    await eventually(lambda: len(listener.kv) == 3)
    listener.announcer.blocks_changed([name(4)], [name(2)])
    await eventually(lambda: len(listener.kv) == 4)
    index = PrefixIndex()

    def apply(events: events_pb2.KVEvents) -> bool:
        return index.apply("w", "i", events.sequence, events.stored, events.removed, snapshot=events.snapshot)

    assert not apply(listener.kv[1])  # the first one was lost
    assert all(apply(events) for events in listener.kv[2:])
    assert [bool(index.matches([name(number)])) for number in (1, 2, 3, 4)] == [False, False, True, True]


async def test_changes_in_a_short_time_are_one_announcement_soon() -> None:
    listener = Listener()
    loop = asyncio.get_running_loop()
    listener.announcer.announce()
    began_s = loop.time()
    for _ in range(5):
        listener.announcer.announce_soon()
    await eventually(lambda: len(listener.announcements) == 2)
    assert loop.time() - began_s >= MIN_PAUSE_S - 0.01
    listener.announcer.announce_soon()
    listener.announcer.announce()  # says it already
    await eventually(lambda: len(listener.announcements) == 3)
    await asyncio.sleep(2 * MIN_PAUSE_S)
    assert len(listener.announcements) == 3


async def test_nothing_is_announced_after_the_farewell() -> None:
    listener = Listener()
    listener.announcer.announce()
    listener.announcer.announce_soon()
    listener.announcer.announce(leaving=True)
    listener.announcer.announce_soon()
    listener.bus.publish(SUBJECTS.discover, b"")
    await asyncio.sleep(2 * MIN_PAUSE_S)
    assert [a.leaving for a in listener.announcements] == [False, True]


async def test_it_hears_of_a_later_worker_with_its_id_and_of_no_other() -> None:
    listener = Listener()

    def hear(incarnation: str, started_ms: int, *, leaving: bool = False) -> None:
        identity = pb.WorkerIdentity(worker_id="w", incarnation=incarnation)
        status = pb.WorkerStatus(identity=identity, started_ms=started_ms)
        announcement = events_pb2.WorkerAnnouncement(status=status, leaving=leaving)
        listener.bus.publish(SUBJECTS.worker("w"), announcement.SerializeToString())

    listener.announcer.announce()  # its own
    hear("older", 999)
    hear("unknown-age", 0)
    hear("later-but-leaving", 3000, leaving=True)
    listener.bus.publish(SUBJECTS.worker("w"), b"\xff")
    hear("later", 1001)
    await eventually(lambda: len(listener.announcements) >= 5 or listener.replaced)
    assert listener.replaced == ["later"]
