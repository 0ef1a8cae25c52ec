"""The workers that the gateway knows, its link to each, and what each said last.

Announcements come over the bus; static addresses, and linked workers that the bus is silent about, are asked over gRPC. A
worker is dropped when its link is gone and it cannot be reached again, never because nobody talks about it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.api.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from baton.services.core.cost_learning import CostBook
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.fleet import Fleet
from baton.services.core.router import Role, WorkerView
from baton.services.core.scheduler.pace import HANDOFF_MEMORY_S
from baton.services.gateway.layouts import compatibility_key, wire_versions
from baton.services.gateway.reported import Reported
from baton.services.gateway.worker_description import describe_worker
from baton.services.gateway.worker_link import WorkerLink
from baton.services.runtime.convert import role_from_wire
from baton.services.runtime.grpc import create_channel
from baton.services.runtime.namesakes import is_replaced_by

log = structlog.get_logger(__name__)

RECONNECT_FIRST_S = 0.1
RECONNECT_LAST_S = 2.0
# A worker that neither answers nor is announced for this long is gone. Kubernetes gives a restarted pod another address.
FORGET_AFTER_S = 15.0
# Announcements come once a second. A linked worker without one for this long is asked directly.
SILENT_AFTER_S = 3.0


@dataclass(slots=True, eq=False)
class KnownWorker:
    """A worker, its link and its last report."""

    status: pb.WorkerStatus
    link: WorkerLink
    heard_s: float
    others_answering: int = 0  # requests of other gateways that a prefill worker answers itself, when it was heard
    task: asyncio.Task[None] | None = None

    @property
    def is_usable(self) -> bool:
        is_ready = self.status.state == pb.WORKER_STATE_READY
        return self.link.is_connected and not self.link.is_suspect and is_ready


class Registry:
    """Keeps one link per worker incarnation alive."""

    def __init__(
        self,
        gateway: pb.WorkerIdentity,
        *,
        clock: Callable[[], float],
        on_heard: Callable[[], None] = lambda: None,
        on_forget: Callable[[str], None] = lambda worker_id: None,
        open_channel: Callable[[str], grpc.aio.Channel] = create_channel,
        peer_timeout_s: float = 2.5,
        costs: CostBook | None = None,
    ) -> None:
        """``costs``: what was learned of the workers' speed, beside what they report."""
        self._costs = costs or CostBook()
        self._open_channel = open_channel
        self._gateway = gateway
        self._clock = clock
        self._on_heard = on_heard
        self._on_forget = on_forget
        self._peer_timeout_s = peer_timeout_s
        self.num_forgotten = 0  # workers
        self.num_fenced = 0  # outputs of attempts that were over, not served
        self._fleet = Fleet()
        self._changed: set[str] = set()  # workers that the fleet does not show as they are
        self._reported = Reported()
        self._unsummed: set[str] = set()  # workers that the sums do not show as they are
        self._workers: dict[str, KnownWorker] = {}
        self._model: KnownWorker | None = None  # whose blocks requests are named for, while it can be used
        self._replaced: dict[str, str] = {}  # worker id -> the older incarnation that was told of last
        self._waiters: set[asyncio.Future[bool]] = set()
        self._unanswered: set[str] = set()  # static addresses that nobody has answered from yet

    def __iter__(self) -> Iterator[KnownWorker]:
        return iter(self._workers.values())

    def get(self, worker_id: str) -> KnownWorker | None:
        return self._workers.get(worker_id)

    def heard(self, status: pb.WorkerStatus, *, leaving: bool = False) -> bool:
        """Takes in what a worker says of itself; False where it is not used.

        An incarnation that began later replaces the one before at once. One that began earlier is an old process that is
        still there, or there again: it is ignored as long as the later one is known.
        """
        role = role_from_wire(status.role)
        worker_id, incarnation = status.identity.worker_id, status.identity.incarnation
        if role is None or not (
            worker_id and incarnation and status.address and status.compatibility.layout.block_size
        ):
            log.warning("ignored a worker's report that lacks identity, role, address or layout", worker_id=worker_id)
            return False
        known = self._workers.get(worker_id)
        if leaving:
            if known is not None and known.link.incarnation == incarnation:  # not the one that has replaced it
                known.status.state = pb.WORKER_STATE_DRAINING
                self._changed.add(worker_id)
            return False
        if known is not None and known.link.incarnation != incarnation:
            if not is_replaced_by(known.status, status):
                if self._replaced.get(worker_id) != incarnation:
                    log.warning("ignored an older worker with the id of one in use", worker_id=worker_id)
                    self._replaced[worker_id] = incarnation
                return False
            self._drop(known)
            known = None
        if known is None:
            link = self._make_link(worker_id, incarnation, role, status.address)
            known = self._workers[worker_id] = KnownWorker(status, link, self._clock())
            known.task = asyncio.create_task(self._keep_linked(known), name=f"link-{worker_id}")
            log.info("worker found", worker_id=worker_id, role=role.value, address=status.address)
        known.status, known.heard_s = status, self._clock()
        known.others_answering = max(0, status.answering - known.link.num_answering)
        self._mark(worker_id)
        self._on_heard()
        self._tell_changed()
        return True

    def _make_link(self, worker_id: str, incarnation: str, role: Role, address: str) -> WorkerLink:
        return WorkerLink(
            worker_id,
            incarnation,
            role,
            address,
            self._gateway,
            open_channel=self._open_channel,
            on_connected=self._tell_changed,
            on_usable=lambda: self._mark(worker_id),
            on_load=lambda: self._on_load(worker_id),
            on_fenced=self._count_fenced,
            peer_timeout_s=self._peer_timeout_s,
        )

    def _mark(self, worker_id: str) -> None:
        self._changed.add(worker_id)
        self._unsummed.add(worker_id)

    def _count_fenced(self) -> None:
        self.num_fenced += 1

    def statuses(self) -> list[pb.WorkerStatus]:
        """The last report of every worker that can be reached."""
        return [known.status for known in self._workers.values() if known.link.is_connected]

    @property
    def reported(self) -> Reported:
        """Sums over these reports."""
        for worker_id in self._unsummed:
            known = self._workers.get(worker_id)
            if known is not None and known.link.is_connected:
                self._reported.put(worker_id, known.status)
            else:
                self._reported.drop(worker_id)
        self._unsummed.clear()
        return self._reported

    def views(self) -> list[WorkerView]:
        """The usable workers as the router sees them."""
        return self.fleet.views()

    def views_with_latest_costs(self) -> list[WorkerView]:
        """The same with all that was learned. The router's views take that in with each worker's next report."""
        self._changed.update(self._workers)
        return self.views()

    @property
    def fleet(self) -> Fleet:
        """The usable workers in the order of their load: one and the same object, brought up to date."""
        for worker_id in self._changed:
            known = self._workers.get(worker_id)
            if known is not None and known.is_usable:
                self._fleet.put(_view(known, self._costs, self._clock()))
            else:
                self._fleet.remove(worker_id)
        self._changed.clear()
        return self._fleet

    def _on_load(self, worker_id: str) -> None:
        known = self._workers.get(worker_id)
        if known is not None and worker_id not in self._changed:
            self._fleet.set_load(worker_id, *_load(known))

    def alive(self) -> frozenset[str]:
        """Incarnations whose links work."""
        return frozenset(known.link.incarnation for known in self._workers.values() if known.link.is_connected)

    async def wait_changed(self) -> bool:
        """Returns True when a worker has come, come back, or said something new."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            return await waiter
        finally:
            self._waiters.discard(waiter)

    def _tell_changed(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(True)

    @property
    def knows_all_static(self) -> bool:
        """Every static address has answered once."""
        return not self._unanswered

    def compatibility(self) -> pb.Compatibility | None:
        """Of the blocks that decode workers take: one that can be used, if there is one. None while nobody is known."""
        known = self._model
        if known is None or self._workers.get(known.link.worker_id) is not known or _unfitness(known) != (False, False):
            known = self._model = min(self._workers.values(), key=_unfitness, default=None)
        return None if known is None else known.status.compatibility

    def describe(self) -> list[dict[str, object]]:
        """``GET /v1/workers``."""
        return [
            describe_worker(known.status, known.link)
            for known in sorted(self._workers.values(), key=lambda known: known.link.worker_id)
        ]

    async def watch_static(self, address: str, every_s: float = 1.0) -> None:
        """Asks the worker at ``address`` about itself, for set-ups without a bus. Runs until cancelled."""
        self._unanswered.add(address)
        while True:
            # After a failure another channel: it has the certificates of then.
            async with self._open_channel(address) as channel:
                try:
                    while True:
                        self.heard(await _ask_status(channel))
                        self._unanswered.discard(address)
                        await asyncio.sleep(every_s)
                except (grpc.aio.AioRpcError, BatonError) as error:
                    log.debug("static worker does not answer", address=address, cause=str(error))
            await asyncio.sleep(every_s)

    async def ask_silent(self, every_s: float = 1.0) -> None:
        """Asks linked workers that the bus brings no news of: else their load would be known as it was when the bus was
        lost. Runs until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            heard_since_s = self._clock() - SILENT_AFTER_S
            silent = [known for known in self if known.link.is_connected and known.heard_s < heard_since_s]
            await asyncio.gather(*(self._ask(known) for known in silent))

    async def _ask(self, known: KnownWorker) -> None:
        async with self._open_channel(known.link.address) as channel:
            try:
                status = await _ask_status(channel)
            except (grpc.aio.AioRpcError, BatonError) as error:
                log.debug("silent worker does not answer", worker_id=known.link.worker_id, cause=str(error))
                return
        if self._workers.get(known.link.worker_id) is known and status.identity.incarnation == known.link.incarnation:
            self.heard(status)

    async def close(self) -> None:
        """Hangs up everywhere and returns when that is done."""
        known_workers = list(self._workers.values())
        for known in known_workers:
            self._drop(known)
        await asyncio.gather(*(known.task for known in known_workers if known.task), return_exceptions=True)

    async def _keep_linked(self, known: KnownWorker) -> None:
        backoff_s, lost_s = RECONNECT_FIRST_S, self._clock()
        while True:
            started_s = self._clock()
            was_connected = await known.link.run()
            now_s = self._clock()
            if was_connected:
                lost_s = now_s
                if now_s - started_s > RECONNECT_LAST_S:
                    backoff_s = RECONNECT_FIRST_S
            if now_s - max(lost_s, known.heard_s) > FORGET_AFTER_S or known.status.state == pb.WORKER_STATE_DRAINING:
                self._drop(known)
                return
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, RECONNECT_LAST_S)

    def _drop(self, known: KnownWorker) -> None:
        worker_id = known.link.worker_id
        if self._workers.get(worker_id) is known:
            del self._workers[worker_id]
            self._mark(worker_id)
            self.num_forgotten += 1
            self._on_forget(worker_id)
            log.info("worker forgotten", worker_id=worker_id, incarnation=known.link.incarnation)
        if known.task is not None and known.task is not asyncio.current_task():
            known.task.cancel()


async def _ask_status(channel: grpc.aio.Channel) -> pb.WorkerStatus:
    """A worker of either kind, asked about itself."""
    stubs: list[tuple[Any, Any]] = [
        (decode_pb2_grpc.DecodeServiceStub(channel), decode_pb2),
        (prefill_pb2_grpc.PrefillServiceStub(channel), prefill_pb2),
    ]
    for stub, messages in stubs:
        try:
            status: pb.WorkerStatus = (await stub.GetStatus(messages.GetStatusRequest(), timeout=5.0)).status
            return status
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
    raise BatonError(ErrorCode.NOT_FOUND, "this address has neither a prefill nor a decode service")


def _unfitness(known: KnownWorker) -> tuple[bool, bool]:
    """To say what decode workers take: smaller is better."""
    return known.link.role is Role.PREFILL, not known.is_usable


def _load(known: KnownWorker) -> tuple[int, int]:
    """Prompt tokens to compute, and requests, of a prefill worker those that it answers itself. The report is up to a second
    old; what this gateway has sent since is counted by its link. The larger one is nearer; answers are too short for that."""
    status, link = known.status, known.link
    tokens = max(status.queued_tokens, link.num_inflight_tokens)
    if link.role is Role.PREFILL:
        return tokens, known.others_answering + link.num_answering
    return tokens, max(status.running + status.queued, link.num_inflight)


def _view(known: KnownWorker, costs: CostBook, now: float) -> WorkerView:
    status, link = known.status, known.link
    blocks = status.kv_blocks
    queued_tokens, running = _load(known)
    cost = costs.cost(
        link.incarnation,
        link.role.value,
        prefill_s_per_token=status.prefill_s_per_token,
        decode_step_s=status.decode_step_s,
        now=now,
    )
    return WorkerView(
        worker_id=link.worker_id,
        incarnation=link.incarnation,
        role=link.role,
        address=link.address,
        compatibility=compatibility_key(status.compatibility),
        wire_versions=wire_versions(status.compatibility),
        host_id=status.host_id,
        queued_tokens=queued_tokens,
        running=running,
        max_num_seqs=status.max_num_seqs or 1,
        available_blocks=blocks.free + blocks.cached,
        max_num_batched_tokens=status.max_num_batched_tokens or 1,
        cost=cost,
        tightest_tpot_s=link.tightest_tpot_s,
        answers_whole=status.answers_whole,
        gets_handoffs=link.handed_over_s > asyncio.get_running_loop().time() - HANDOFF_MEMORY_S,
    )
