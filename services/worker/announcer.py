"""Tells the bus who this worker is and which blocks it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from baton.api.common.v1 import common_pb2 as pb
from baton.api.events.v1 import events_pb2
from baton.services.runtime.bus import Bus
from baton.services.runtime.namesakes import is_replaced_by
from baton.services.runtime.subjects import Subjects

ANNOUNCE_EVERY_S = 1.0
# Changes of state are told at once, but not more often than this.
MIN_PAUSE_S = 0.1
# 16-byte names; well below NATS's usual payload limit of 1 MiB.
MAX_NAMES_PER_MESSAGE = 16_384


class Announcer:
    """Publishes announcements and KV events. All of it may be lost; sequence numbers let listeners notice."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        identity: pb.WorkerIdentity,
        *,
        status: Callable[[], pb.WorkerStatus],
        collect_names: Callable[[Callable[[Sequence[bytes]], None]], None],
        on_replaced: Callable[[str], None] = lambda incarnation: None,
    ) -> None:
        """``collect_names`` calls back with the names of all blocks that the pool could reuse then, for a snapshot: after
        every change that was told before, and before every later one. ``on_replaced`` is told of a later worker with the
        same id, by its incarnation."""
        self._bus = bus
        self._subjects = subjects
        self._identity = identity
        self._status = status
        self._collect_names = collect_names
        self._sequence = 0
        self._kv_sequence = 0
        self._announced_s = 0.0
        self._soon: asyncio.TimerHandle | None = None
        self._has_left = False
        self._on_replaced = on_replaced
        bus.subscribe(subjects.worker(identity.worker_id), self._on_namesake)
        bus.subscribe(subjects.discover, lambda subject, payload: self.announce())
        bus.subscribe(subjects.kv_snapshot(identity.worker_id), lambda subject, payload: self._send_snapshot())

    @property
    def kv_sequence(self) -> int:
        return self._kv_sequence

    async def run(self) -> None:
        """Announces once a second until cancelled, and whenever the bus is there anew."""
        self._bus.on_connect(self._introduce)
        while True:
            self.announce()
            await asyncio.sleep(ANNOUNCE_EVERY_S)

    def announce_soon(self) -> None:
        """The state has changed. Of several changes in a short time one announcement tells."""
        if self._soon is None:
            loop = asyncio.get_running_loop()
            self._soon = loop.call_at(max(loop.time(), self._announced_s + MIN_PAUSE_S), self.announce)

    def announce(self, *, leaving: bool = False) -> None:
        """``leaving``: for the last time. What is announced later would bring the worker back."""
        if self._has_left:
            return
        self._has_left = leaving
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        self._announced_s = asyncio.get_running_loop().time()
        self._sequence += 1
        announcement = events_pb2.WorkerAnnouncement(status=self._status(), sequence=self._sequence, leaving=leaving)
        self._bus.publish(self._subjects.worker(self._identity.worker_id), announcement.SerializeToString())

    def blocks_changed(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """The pool gained and lost these names since the last call."""
        while stored or removed:
            self._publish_kv(stored[:MAX_NAMES_PER_MESSAGE], removed[:MAX_NAMES_PER_MESSAGE])
            stored, removed = stored[MAX_NAMES_PER_MESSAGE:], removed[MAX_NAMES_PER_MESSAGE:]

    def _on_namesake(self, subject: str, payload: bytes) -> None:
        """Somebody has announced a worker with this one's id: mostly this one itself."""
        announcement = events_pb2.WorkerAnnouncement()
        try:
            announcement.ParseFromString(payload)
        except DecodeError:
            return  # gateways log it
        other = announcement.status
        if other.identity.incarnation == self._identity.incarnation or announcement.leaving or not other.started_ms:
            return
        if is_replaced_by(self._status(), other):
            self._on_replaced(other.identity.incarnation)

    def _introduce(self) -> None:
        self.announce()
        self._send_snapshot()

    def _send_snapshot(self) -> None:
        self._collect_names(self._publish_snapshot)

    def _publish_snapshot(self, names: Sequence[bytes]) -> None:
        self._publish_kv(names[:MAX_NAMES_PER_MESSAGE], (), snapshot=True)
        self.blocks_changed(names[MAX_NAMES_PER_MESSAGE:], ())

    def _publish_kv(self, stored: Sequence[bytes], removed: Sequence[bytes], *, snapshot: bool = False) -> None:
        self._kv_sequence += 1
        events = events_pb2.KVEvents(
            identity=self._identity,
            sequence=self._kv_sequence,
            stored=stored,
            removed=removed,
            snapshot=snapshot,
        )
        self._bus.publish(self._subjects.kv(self._identity.worker_id), events.SerializeToString())
