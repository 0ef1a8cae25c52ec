"""What is heard on the bus: every message may be lost, late or wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers.scripted_worker import ScriptedWorker
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.api.events.v1 import events_pb2
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.router import Role
from baton.services.gateway.discovery import Discovery
from baton.services.gateway.registry import Registry
from baton.services.runtime.bus import InProcessBus
from baton.services.runtime.subjects import Subjects

SUBJECTS = Subjects("test")
GATEWAY = pb.WorkerIdentity(worker_id="gateway", incarnation="g")


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Heard:
    """A gateway's ears, and a worker that speaks into them."""

    def __init__(self) -> None:
        self.bus = InProcessBus()
        self.snapshots_asked = 0
        self.discovers = 0
        self.bus.subscribe(SUBJECTS.kv_snapshot("d"), self._on_snapshot_request)
        self.bus.subscribe(SUBJECTS.discover, self._on_discover)
        self.index = PrefixIndex()
        self.registry = Registry(GATEWAY, clock=lambda: 0.0, on_forget=self.index.forget)
        Discovery(self.bus, SUBJECTS, GATEWAY, self.registry, self.index)
        self.worker = ScriptedWorker("d", Role.DECODE, lambda worker, spec: None)
        self.worker.address = "127.0.0.1:1"

    def _on_snapshot_request(self, subject: str, payload: bytes) -> None:
        self.snapshots_asked += 1

    def _on_discover(self, subject: str, payload: bytes) -> None:
        self.discovers += 1

    async def announce(self, *, subject: str = "d", leaving: bool = False, **fields: Any) -> None:
        announcement = events_pb2.WorkerAnnouncement(status=self.worker.status(**fields), leaving=leaving)
        await self.publish(SUBJECTS.worker(subject), announcement.SerializeToString())

    async def events(
        self, sequence: int, stored: tuple[int, ...] = (), removed: tuple[int, ...] = (), *, snapshot: bool = False
    ) -> None:
        events = events_pb2.KVEvents(
            identity=self.worker.identity,
            sequence=sequence,
            stored=map(name, stored),
            removed=map(name, removed),
            snapshot=snapshot,
        )
        await self.publish(SUBJECTS.kv("d"), events.SerializeToString())

    async def publish(self, subject: str, payload: bytes) -> None:
        self.bus.publish(subject, payload)
        for _ in range(3):  # delivered, answered, and the answer delivered
            await asyncio.sleep(0)

    def holds(self, *numbers: int) -> bool:
        return all(self.index.matches([name(number)]) == {"d": 1} for number in numbers)


@pytest.fixture
async def heard() -> AsyncIterator[Heard]:
    made = Heard()
    yield made
    await made.registry.close()


async def test_a_gateway_asks_who_is_there(heard: Heard) -> None:
    await eventually(lambda: heard.discovers == 1)


async def test_announcements_make_workers_known_and_a_farewell_marks_them(heard: Heard) -> None:
    await heard.announce()
    assert [worker["id"] for worker in heard.registry.describe()] == ["d"]
    await heard.announce(leaving=True)
    known = heard.registry.get("d")
    assert known is not None
    assert known.status.state == pb.WORKER_STATE_DRAINING


async def test_nobody_speaks_for_another_worker(heard: Heard) -> None:
    await heard.announce(subject="e")
    await heard.publish(SUBJECTS.worker("d"), b"\xff\xff not a message")
    await heard.publish(SUBJECTS.kv("d"), b"\xff\xff not a message")
    assert heard.registry.describe() == []


async def test_events_of_a_known_worker_feed_the_index(heard: Heard) -> None:
    await heard.events(1, (9,))
    assert not heard.holds(9)  # of nobody we know
    await heard.announce()
    await heard.events(1, (1, 2))
    await heard.events(2, (3,), (1,))
    assert heard.holds(2, 3)
    assert not heard.holds(1)
    assert heard.snapshots_asked == 0


async def test_a_gap_is_mended_by_a_snapshot_and_asked_for_until_it_comes(heard: Heard) -> None:
    await heard.announce()
    await heard.events(1, (1,))
    await heard.events(3, (3,))
    assert heard.snapshots_asked == 1
    await heard.events(4, (4,))  # no new gap: one question is under way
    assert heard.snapshots_asked == 1
    await heard.announce()  # the question, or its answer, was lost
    assert heard.snapshots_asked == 2
    await heard.events(5, (2, 3, 4), snapshot=True)
    assert heard.holds(2, 3, 4)
    assert not heard.holds(1)
    await heard.announce()
    assert heard.snapshots_asked == 2


async def test_a_lost_message_that_nothing_follows_is_noticed_by_the_second_announcement_after_it(heard: Heard) -> None:
    await heard.announce()
    await heard.events(1, (1,))
    await heard.announce(kv_event_seq=2)  # the second message may still be on its way
    assert heard.snapshots_asked == 0
    await heard.announce(kv_event_seq=2)
    assert heard.snapshots_asked == 1
    await heard.events(3, (1, 2), snapshot=True)
    await heard.announce(kv_event_seq=3)
    await heard.announce(kv_event_seq=3)
    assert (heard.snapshots_asked, heard.holds(1, 2)) == (1, True)


async def test_a_worker_that_was_there_before_the_gateway_is_asked_what_it_holds(heard: Heard) -> None:
    await heard.announce(kv_event_seq=7)
    assert heard.snapshots_asked == 1
    await heard.events(8, (1,), snapshot=True)
    await heard.announce(kv_event_seq=8)
    assert (heard.snapshots_asked, heard.holds(1)) == (1, True)


async def test_a_restart_forgets_what_the_process_before_held(heard: Heard) -> None:
    await heard.announce()
    await heard.events(1, (1,))
    heard.worker.identity.incarnation = "next"
    await heard.announce()
    assert not heard.holds(1)
    await heard.events(1, (2,))
    assert heard.holds(2)
