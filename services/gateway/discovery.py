"""Hears workers on the bus: announcements feed the registry, KV events the prefix index."""

from __future__ import annotations

import structlog
from google.protobuf.message import DecodeError

from baton.api.common.v1 import common_pb2 as pb
from baton.api.events.v1 import events_pb2
from baton.services.core.prefix_index import PrefixIndex
from baton.services.gateway.registry import Registry
from baton.services.runtime.bus import Bus
from baton.services.runtime.subjects import Subjects

log = structlog.get_logger(__name__)


class Discovery:
    """Everything that it hears is a hint: a wrong one costs a cache miss or a connection attempt."""

    def __init__(
        self, bus: Bus, subjects: Subjects, gateway: pb.WorkerIdentity, registry: Registry, prefix_index: PrefixIndex
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._gateway = gateway
        self._registry = registry
        self._prefix_index = prefix_index
        self._incomplete: set[str] = set()  # workers whose events were missed, until their snapshot comes
        self._announced: dict[str, int] = {}  # sequence number of each worker's events as it last announced it
        bus.subscribe(subjects.all_workers, self._on_announcement)
        bus.subscribe(subjects.all_kv, self._on_kv_events)
        bus.on_connect(self._on_connect)

    def _on_connect(self) -> None:
        request = events_pb2.DiscoverRequest(gateway=self._gateway)
        self._bus.publish(self._subjects.discover, request.SerializeToString())

    def _on_announcement(self, subject: str, payload: bytes) -> None:
        announcement = events_pb2.WorkerAnnouncement()
        try:
            announcement.ParseFromString(payload)
        except DecodeError:
            log.warning("ignored an announcement that cannot be read", subject=subject, num_bytes=len(payload))
            return
        if subject != self._subjects.worker(announcement.status.identity.worker_id):
            log.warning("ignored an announcement on another worker's subject", subject=subject)
            return
        status = announcement.status
        worker_id = status.identity.worker_id
        known = self._registry.get(worker_id)
        is_new = known is None or known.link.incarnation != status.identity.incarnation
        is_used = self._registry.heard(status, leaving=announcement.leaving)
        if not is_used and not announcement.leaving:
            return
        if announcement.leaving or self._registry.get(worker_id) is None:
            self._incomplete.discard(worker_id)
            self._announced.pop(worker_id, None)
            return
        # Nothing may follow the last message, so that nobody would notice its loss. The two subjects are not in step, so
        # only what was announced the time before must have come by now.
        announced = 0 if is_new else self._announced.get(worker_id, 0)
        is_behind = self._prefix_index.sequence(worker_id, status.identity.incarnation) < announced
        self._announced[worker_id] = status.kv_event_seq
        if worker_id in self._incomplete or is_behind or (is_new and status.kv_event_seq):
            self._ask_for_snapshot(worker_id)  # again, where the last question or its answer was lost

    def _on_kv_events(self, subject: str, payload: bytes) -> None:
        events = events_pb2.KVEvents()
        try:
            events.ParseFromString(payload)
        except DecodeError:
            log.warning("ignored KV events that cannot be read", subject=subject, num_bytes=len(payload))
            return
        worker_id = events.identity.worker_id
        known = self._registry.get(worker_id)
        if known is None or known.link.incarnation != events.identity.incarnation:
            return  # nobody of ours, or no longer
        is_gapless = self._prefix_index.apply(
            worker_id,
            events.identity.incarnation,
            events.sequence,
            events.stored,
            events.removed,
            snapshot=events.snapshot,
        )
        if events.snapshot:
            self._incomplete.discard(worker_id)
        elif not is_gapless and worker_id not in self._incomplete:
            self._ask_for_snapshot(worker_id)

    def _ask_for_snapshot(self, worker_id: str) -> None:
        self._incomplete.add(worker_id)
        request = events_pb2.KVSnapshotRequest(gateway=self._gateway)
        self._bus.publish(self._subjects.kv_snapshot(worker_id), request.SerializeToString())
