"""The process around a worker: loads the model, lays out memory, serves gRPC, announces itself, drains."""

from __future__ import annotations

import asyncio
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Generic, TypeVar

import grpc
import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.kvtransfer.v1 import kvtransfer_pb2
from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferError
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.incoming import ReceiverHost
from baton.kvtransfer.layout import Compatibility, KVLayout
from baton.kvtransfer.memory import BlockMemory, HostBlockMemory
from baton.kvtransfer.staging import StagedBlockMemory, staging_rows
from baton.kvtransfer.wire import compatibility_to_wire
from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.errors import ConfigurationError
from baton.services.core.quarantine import QuarantineBudget, QuarantineLimits
from baton.services.core.router import Role
from baton.services.core.scheduler.pace import Pace
from baton.services.core.watchdog import WatchdogLimits
from baton.services.engine.engine import Engine, set_num_threads
from baton.services.engine.kv_cache import KVCacheShape
from baton.services.engine.loader import LoadedModel, load_model
from baton.services.runtime import convert
from baton.services.runtime import grpc as runtime_grpc
from baton.services.runtime.block_key import read_block_key
from baton.services.runtime.bus import Bus
from baton.services.runtime.failpoints import FailpointReached, clear_failpoints, enable_failpoints, reach
from baton.services.runtime.health import SERVICE_NAME, Health
from baton.services.runtime.make_bus import make_bus
from baton.services.runtime.net import format_address
from baton.services.runtime.settings import WorkerSettings
from baton.services.runtime.subjects import Subjects
from baton.services.runtime.tls import internal_files
from baton.services.worker.announcer import Announcer
from baton.services.worker.environment import Environment
from baton.services.worker.failpoints import FailpointEngine, FailpointPool
from baton.services.worker.ledger import LedgerServicer
from baton.services.worker.limits import allowed_transports, make_limits, make_transfer_options
from baton.services.worker.parts import WorkerParts
from baton.services.worker.pool_report import LedgerAudit, PoolReport, PoolWatch, add_report
from baton.services.worker.quarantine import QuarantineWatch
from baton.services.worker.speed import Speed, warm_up
from baton.services.worker.watchdog import WatchdogThread
from baton.services.worker.worker import Worker

log = structlog.get_logger(__name__)

WorkerT = TypeVar("WorkerT", bound=Worker[Any])

_DRAIN_POLL_S = 0.05


class WorkerHost(ABC, Generic[WorkerT]):
    """See ``runtime.main.Service``. The two kinds of worker differ in the abstract methods."""

    def __init__(
        self,
        settings: WorkerSettings,
        load: Callable[[], LoadedModel] | None = None,
        bus: Bus | None = None,
        environment: Environment | None = None,
    ) -> None:
        """``load`` and ``bus`` replace the model folder and NATS of the settings, for several workers in one process."""
        self.settings = settings
        self._environment = (environment or Environment()).secured(internal_files(settings))
        self.worker: WorkerT | None = None
        self._load = load or self._load_model
        self._stack = AsyncExitStack()  # what ``stop`` undoes, last first
        if bus is None:
            bus = make_bus(settings, settings.worker_id or settings.role)
            self._stack.push_async_callback(bus.close)
        self._bus = bus
        self._health = Health()
        worker_id = settings.worker_id or f"{settings.role}-{secrets.token_hex(4)}"
        self.identity = pb.WorkerIdentity(worker_id=worker_id, incarnation=self._environment.new_incarnation())
        self._started_ms = int(self._environment.wall_clock() * 1e3)
        self._report: PoolReport | None = None
        self._speed = Speed()  # as the warm-up measured it

    @abstractmethod
    def make_worker(self, parts: WorkerParts, on_turn: Callable[[Any, float], None]) -> WorkerT:
        """Builds the worker around its scheduler."""

    @abstractmethod
    def receiver(self, worker: WorkerT) -> ReceiverHost:
        """What takes blocks in."""

    @abstractmethod
    def add_servicer(self, server: grpc.aio.Server, worker: WorkerT) -> Sequence[str]:
        """Adds the role's gRPC service and returns its full name."""

    async def start(self) -> None:
        settings, stack = self.settings, self._stack
        # Before the weights: a port that is taken should be told of at once.
        server = self._environment.create_server()
        self.port = runtime_grpc.bind_server(server, settings.host, settings.port, self._environment.tls)
        loaded = self.loaded = await asyncio.to_thread(self._load)
        shape = KVCacheShape.of(loaded.config, settings.block_size, loaded.dtype)
        num_blocks = shape.num_blocks_in(settings.kv_cache_memory)
        self._limits = make_limits(settings, loaded, num_blocks)
        self._layout = KVLayout(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.block_size, shape.dtype_name, shape.order
        )
        self._compatibility = Compatibility(loaded.fingerprint, self._layout)
        limits = QuarantineLimits(settings.max_quarantine_share, settings.replace_unhealthy_after_s)
        self._budget = QuarantineBudget(num_blocks, limits)
        engine, self._memory = await asyncio.to_thread(self._lay_out, loaded, num_blocks, shape.block_bytes)
        stack.callback(self._memory.close)
        stack.callback(engine.grammars.close)
        make_pool = FailpointPool if settings.failpoints else BlockPool
        pool = self._pool = make_pool(num_blocks, settings.block_size, int(num_blocks * settings.session_cache_share))
        parts = WorkerParts(
            identity=self.identity,
            pool=pool,
            limits=self._limits,
            engine=FailpointEngine(engine) if settings.failpoints else engine,
            namer=BlockNamer(read_block_key(settings), loaded.fingerprint),
            vocab_size=loaded.config.vocab_size,
            prefix_caching=settings.prefix_caching,
            grammars=engine.grammars,
            pace=Pace(self._speed.warm_s_per_token, self._speed.warm_step_s),
            clock=self._environment.clock,
            step_loop=self._environment.step_loop,
        )
        self._announcer = Announcer(
            self._bus,
            Subjects(settings.cluster),
            self.identity,
            status=self._status,
            collect_names=self._collect_names,
            on_replaced=self._on_replaced,
        )
        audit = self._audit = LedgerAudit(pool)
        watch = PoolWatch(
            pool, audit, asyncio.get_running_loop(), on_report=self._on_report, on_names=self._announcer.blocks_changed
        )
        worker = self.worker = self.make_worker(parts, watch.on_turn)
        worker.speed = self._speed
        agent = self._agent = worker.agent = worker.fetcher.agent = self._make_agent(worker)
        worker.fetcher.own_address = self.address
        self._quarantine = self._watch_quarantine(worker)
        worker.steps.start()
        stack.push_async_callback(worker.steps.stop)
        stack.push_async_callback(server.stop, 0.5)
        stack.push_async_callback(agent.close)
        try:
            await agent.start()
        except TransferError as error:
            raise ConfigurationError(f"--kv-port {settings.kv_port}: {error.message}") from error
        agent.add_to_server(server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(
            LedgerServicer(worker, pool, self._environment.change_role, shape.block_bytes), server
        )
        names = [
            *self.add_servicer(server, worker),
            *runtime_grpc.service_names(kvtransfer_pb2.DESCRIPTOR),
            worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
        ]
        if settings.failpoints:
            names += enable_failpoints(settings.failpoints, server, self.identity.worker_id)
            stack.callback(clear_failpoints)
        self._health.add_to(server)
        runtime_grpc.enable_reflection(server, [*names, SERVICE_NAME])
        await self.status()  # so that the first announcement knows the pool
        stack.push_async_callback(worker.stop_requests)
        await server.start()
        self._health.set_ready()
        self._run_until_stop(self._announcer.run(), "announce")
        await self._bus.start()
        self._run_until_stop(self._keep_alive(worker), "keep-alive")
        self._run_until_stop(self._quarantine.run(), "quarantine")
        stack.callback(lambda: self._announcer.announce(leaving=True))
        self._watch(worker, engine)
        log.info(
            "worker ready",
            worker_id=self.identity.worker_id,
            role=settings.role,
            address=self.address,
            blocks=num_blocks,
            block_bytes=shape.block_bytes,
            dtype=shape.dtype_name,
            max_model_len=self._limits.max_model_len,
        )

    def _watch(self, worker: WorkerT, engine: Engine) -> None:
        """Where this is the only worker of its process: who watches it can do nothing but end that."""
        end_process, settings = self._environment.end_process, self.settings
        if end_process is None or not settings.stuck_after_s:
            return
        # A GPU's layers are launched at once, and the step ends long after the last of them.
        signs_per_step = engine.shape.num_layers if engine.device.type == "cpu" else 1
        watchdog = WatchdogThread(
            WatchdogLimits(settings.stuck_after_s, signs_per_step=signs_per_step),
            loop=asyncio.get_running_loop(),
            num_turns=lambda: worker.steps.num_turns + engine.progress.num_signs,
            is_thread_alive=lambda: worker.steps.is_alive,
            expected_step_s=worker.expected_step_s,
            on_stuck=self._health.set_dead,
            end=end_process,
        )
        watchdog.start()
        self._stack.callback(watchdog.stop)

    def _watch_quarantine(self, worker: WorkerT) -> QuarantineWatch:
        return QuarantineWatch(
            self._budget,
            count=lambda: self._agent.stats().num_quarantined,
            clock=self._environment.clock,
            health=self._health,
            on_change=self._announcer.announce_soon,
            drain=lambda: self.drain_within(0.0),
            end=self._environment.end_process or (lambda status: worker.broken.set()),
        )

    @property
    def address(self) -> str:
        return format_address(self.settings.public_host, self.settings.advertise_port or self.port)

    def _load_model(self) -> LoadedModel:
        settings = self.settings
        assert settings.model is not None  # the command line fills it in
        return load_model(settings.model, dtype=settings.dtype, device=settings.device)

    def _lay_out(self, loaded: LoadedModel, num_blocks: int, block_bytes: int) -> tuple[Engine, BlockMemory]:
        """On a CPU the cache lies in memory that peers on the host can map; a GPU's cache has a staging area beside it."""
        block_size = self.settings.block_size
        if self.settings.threads_per_worker is not None:
            set_num_threads(self.settings.threads_per_worker)
        if loaded.device.type == "cpu":
            host_memory = HostBlockMemory(num_blocks, block_bytes)
            memory: BlockMemory = host_memory
            engine = Engine(loaded, num_blocks=num_blocks, block_size=block_size, memory=host_memory.tensor)
        else:
            engine = Engine(loaded, num_blocks=num_blocks, block_size=block_size)
            memory = StagedBlockMemory(engine.kv_cache, staging_rows(num_blocks, block_bytes))
        capacity = num_blocks * block_size
        self._speed = warm_up(
            engine, min(self._limits.max_num_batched_tokens, self._limits.max_model_len, capacity) - 1
        )
        return engine, memory

    def _make_agent(self, worker: WorkerT) -> TransferAgent:
        settings = self.settings
        try:
            return TransferAgent(
                WorkerIdentity(self.identity.worker_id, self.identity.incarnation),
                self._compatibility,
                self._memory,
                self.receiver(worker),
                holder=worker.fetcher,
                transports=allowed_transports(settings),
                options=make_transfer_options(settings, self._budget),
                data_host=settings.host,
                data_port=settings.kv_port,
                advertised_host=settings.public_host,
                advertised_port=settings.advertise_kv_port,
                open_channel=self._environment.open_channel,
                sockets=self._environment.sockets,
                clock=self._environment.clock,
            )
        except TransferError as error:
            raise ConfigurationError(f"--transport {settings.transport}: {error.message}") from error

    async def wait_failed(self) -> None:
        assert self.worker is not None
        await self.worker.broken.wait()

    async def drain(self) -> None:
        assert self.worker is not None
        self._health.set_draining()
        self._announcer.announce()
        await self.worker.drain()
        # Peers may still be reading blocks, or writing into some: leases and quarantine end by themselves.
        while not await self._holds_nothing():  # noqa: ASYNC110  several places change it, none of which tells
            await asyncio.sleep(_DRAIN_POLL_S)

    async def drain_within(self, timeout_s: float) -> int:
        """Drains on somebody's request; returns how many requests were given up because the time was over."""
        assert self.worker is not None
        try:
            async with asyncio.timeout(timeout_s or self.settings.drain_timeout_s):
                await self.drain()
        except TimeoutError:
            return await self.worker.stop_requests()
        return 0

    async def _holds_nothing(self) -> bool:
        blocks, transfers = (await self.status()).kv_blocks, self._agent.stats()
        if self._quarantine.is_lost:
            return not (blocks.request or blocks.transfer)  # the rest does not end
        is_moving = transfers.num_sending or transfers.num_receiving or transfers.num_quarantined
        return not (blocks.request or blocks.transfer or blocks.quarantine or is_moving)

    async def stop(self) -> None:
        await self._stack.aclose()

    def _run_until_stop(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._stack.callback(asyncio.create_task(work, name=name).cancel)

    async def status(self) -> pb.WorkerStatus:
        """The worker as it is now, not as it was at the last report."""
        assert self.worker is not None
        audit, clock = self._audit, self._environment.clock
        self._report = await self.worker.steps.call(lambda scheduler: audit.report(scheduler, clock()))
        return self._status()

    def _on_replaced(self, incarnation: str) -> None:
        """Another process has this worker's id and began later: it serves, and this one must not."""
        assert self.worker is not None
        if not self.worker.broken.is_set():
            log.error("another worker has taken over this one's id; stopping", incarnation=incarnation)
            self._health.set_dead("another worker has this one's id")
            self.worker.broken.set()

    def _collect_names(self, take: Callable[[Sequence[bytes]], None]) -> None:
        assert self.worker is not None
        steps = self.worker.steps
        steps.post(lambda scheduler: steps.tell(take, self._pool.names()))

    def _on_report(self, report: PoolReport) -> None:
        was_idle = self._report is not None and self._report.is_idle
        self._report = report
        if report.is_idle != was_idle:
            self._announcer.announce_soon()

    async def _keep_alive(self, worker: WorkerT) -> None:
        """Tells the ledger, well within a lease, which transfers are alive."""
        while True:
            await asyncio.sleep(1.0)
            with suppress(FailpointReached):
                reach("loop.turn")
            worker.renew_leases()

    def _state(self) -> pb.WorkerState:
        if self._health.is_draining:
            return pb.WORKER_STATE_DRAINING
        return pb.WORKER_STATE_UNHEALTHY if self._quarantine.problem else pb.WORKER_STATE_READY

    def _status(self) -> pb.WorkerStatus:
        worker, report, transfers = self.worker, self._report, self._agent.stats()
        status = pb.WorkerStatus(
            identity=self.identity,
            role=convert.role_to_wire(Role(self.settings.role)),
            answers_whole=self.settings.role == Role.PREFILL.value,
            state=self._state(),
            problem=self._quarantine.problem,
            pid=os.getpid(),
            started_ms=self._started_ms,
            address=self.address,
            model=self.settings.served_model_name or self.settings.model or "",
            compatibility=compatibility_to_wire(self._agent.compatibility),
            max_model_len=self._limits.max_model_len,
            max_num_seqs=self._limits.max_num_seqs,
            max_num_batched_tokens=self._limits.max_num_batched_tokens,
            kv_data_address=self._agent.data_address,
            host_id=self._agent.host_id,
            kv_event_seq=self._announcer.kv_sequence,
            retained_bytes_budget=self._pool.retention.max_blocks * self._layout.block_bytes,
            fenced_total=transfers.fenced,
            corrupt_blocks_total=transfers.corrupt_blocks,
            kv_transfer_bytes_total=dict(transfers.bytes_received),
        )
        if worker is not None:
            status.prefill_s_per_token = worker.speed.prefill_s_per_token
            status.decode_step_s = worker.speed.decode_step_s
            status.prompt_share = worker.speed.prompt_share
            status.prompt_tokens_total = worker.speed.prompt_tokens_total
            status.generation_tokens_total = worker.speed.generation_tokens_total
            status.out_of_memory_total = worker.steps.num_out_of_memory
        if report is not None:
            add_report(status, report, self._layout.block_bytes)
        return status
