"""The gateway process: finds workers, answers REST and gRPC, drains."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import grpc
import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.inference.v1 import inference_pb2, inference_pb2_grpc
from baton.services.core.cost_learning import CostBook
from baton.services.core.errors import ErrorCode
from baton.services.core.fetch import FetchMode, FetchPolicy
from baton.services.core.ladder_steps import LadderLimits
from baton.services.core.links import LinkMatrix
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.router import Placement, Role
from baton.services.core.scheduler.output_length import OutputLengthEstimator
from baton.services.engine.config_file import ConfigFile
from baton.services.engine.model_folder import resolve_model_folder
from baton.services.gateway.app import create_admin_app, create_app
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.deps import GatewayDeps, Refusal
from baton.services.gateway.discovery import Discovery
from baton.services.gateway.dispatch import WorkerDispatcher
from baton.services.gateway.experience import Experience, read_profiles
from baton.services.gateway.grpc_inference import InferenceServicer
from baton.services.gateway.http_server import HttpServer
from baton.services.gateway.limits import Limits
from baton.services.gateway.link_prober import LinkProber, describe_links
from baton.services.gateway.readiness import Readiness
from baton.services.gateway.receipts import GenerationRecord, ReceiptBook
from baton.services.gateway.registry import Registry
from baton.services.gateway.served_model import ServedModel, read_generation_config
from baton.services.gateway.session_calls import SessionCalls
from baton.services.gateway.tenant_files import Ring, TenantFiles, ring_of_keys
from baton.services.gateway.tokenizer import ModelTokenizer, load_tokenizer
from baton.services.gateway.worker_calls import WorkerCalls
from baton.services.runtime import grpc as runtime_grpc
from baton.services.runtime.admin_options import ADMIN_HOST
from baton.services.runtime.block_key import read_block_key
from baton.services.runtime.bus import Bus
from baton.services.runtime.failpoints import enable_failpoints
from baton.services.runtime.health import SERVICE_NAME, Health
from baton.services.runtime.make_bus import make_bus
from baton.services.runtime.metrics import Metrics
from baton.services.runtime.net import bind_listener, format_address
from baton.services.runtime.settings import GatewaySettings, is_loopback
from baton.services.runtime.subjects import Subjects
from baton.services.runtime.tls import internal_files, public_files

log = structlog.get_logger(__name__)

_LOOK_EVERY_S = 0.2  # for a pair, while there has been none
# What is no fault of the request: it counts as one that missed its SLO.
_REFUSED = frozenset(
    {
        *(ErrorCode.OVERLOADED, ErrorCode.DRAINING, ErrorCode.NO_WORKERS),
        *(ErrorCode.RATE_LIMITED, ErrorCode.QUOTA_EXCEEDED),
    }
)


class GatewayService:
    """See ``runtime.main.Service``."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._identity = pb.WorkerIdentity(worker_id=f"gateway-{os.getpid()}", incarnation=uuid.uuid4().hex)
        self._prefix_index = PrefixIndex()
        self._health = Health()
        self._links = LinkMatrix()
        self._readiness = Readiness(needs_pair=self._needs_pair, links=self._links)
        self._look_s = 0.0  # when to look for the first pair again
        self._others_tokens = 0  # prompt tokens of other gateways that wait on workers
        self._stack = AsyncExitStack()  # what ``stop`` undoes, last first

    async def start(self) -> None:
        settings, stack = self._settings, self._stack
        # Before the tokenizer: a port that is taken should be told of at once.
        listener = bind_listener(settings.host, settings.port)
        stack.callback(listener.close)
        admin_listener = None
        if settings.admin_port is not None:
            admin_listener = bind_listener(ADMIN_HOST, settings.admin_port)
            stack.callback(admin_listener.close)
        grpc_server = runtime_grpc.create_server()
        self._public_tls, internal_tls = public_files(settings), internal_files(settings)
        grpc_port = runtime_grpc.bind_server(grpc_server, settings.host, settings.grpc_port, self._public_tls)
        open_channel = self._open_channel = partial(runtime_grpc.create_channel, tls=internal_tls)
        model, tokenizer = await asyncio.to_thread(self._load_model)
        stack.callback(tokenizer.close)
        costs = CostBook(read_profiles(settings.profile) if settings.profile else None)
        output_lengths = OutputLengthEstimator()
        self._experience = Experience(costs, time.monotonic, output_lengths)
        self._registry = Registry(
            self._identity,
            clock=time.monotonic,
            costs=costs,
            on_heard=self._on_heard,
            on_forget=self._prefix_index.forget,
            peer_timeout_s=settings.peer_timeout_s,
            open_channel=open_channel,
        )
        self._metrics = Metrics(self._registry.statuses, version=version("baton-llm"), num_waiting=self._num_waiting)
        self._receipts = ReceiptBook(self._on_end)
        authenticator = self._start_authenticator()
        dispatcher = self._dispatcher = WorkerDispatcher(
            self._registry,
            self._prefix_index,
            read_block_key(settings),
            self._receipts,
            clock=time.monotonic,
            placement=Placement(settings.placement),
            limits=LadderLimits(max_wait_s=settings.worker_wait_s),
            fetch=FetchPolicy(FetchMode(settings.fetch)),
            on_start=self._metrics.request_admitted,
            links=self._links,
            output_lengths=output_lengths,
        )
        self._deps = GatewayDeps(
            dispatcher=dispatcher,
            tokenizer=tokenizer,
            model=model,
            ready=self._ready,
            metrics=self._render_metrics,
            workers=lambda: describe_links(self._registry, self._links, time.monotonic()),
            receipt=self._receipts.get,
            decisions=self._describe_decisions,
            authenticator=authenticator,
            limits=Limits(
                max_concurrent_requests=settings.max_concurrent_requests,
                max_body_bytes=settings.max_body_size,
                request_timeout_s=settings.request_timeout_s,
                patience_s=settings.worker_wait_s,
            ),
            on_refused=self._on_refused,
            tool_parser=settings.tool_call_parser,
            reasoning_parser=settings.reasoning_parser,
            operations=WorkerCalls(self._registry, open_channel),
            sessions=SessionCalls(self._registry, open_channel),
            others_tokens=lambda: self._others_tokens,
        )
        stack.callback(self._deps.grammars.close)
        await self._start_bus()
        await self._start_grpc(grpc_server)
        self._start_http(listener, admin_listener)
        self._health.set_ready()
        admin_port = admin_listener.getsockname()[1] if admin_listener is not None else None
        if settings.admin_url_file is not None and admin_port is not None:
            settings.admin_url_file.write_text(f"http://{format_address(ADMIN_HOST, admin_port)}\n", encoding="ascii")
        log.info("listening", rest=listener.getsockname()[1], grpc=grpc_port, admin=admin_port, model=model.name)

    def _load_model(self) -> tuple[ServedModel, ModelTokenizer]:
        settings = self._settings
        assert settings.model is not None  # the command line fills it in
        folder = resolve_model_folder(settings.model)
        tokenizer = load_tokenizer(folder)
        defaults, eos_token_ids = read_generation_config(folder)
        model = ServedModel(
            name=settings.served_model_name or settings.model,
            max_model_len=settings.max_model_len or _context_length(folder),
            vocab_size=ConfigFile.read(folder / "config.json").integer("vocab_size"),
            # A chat model's own end-of-turn token may stand in its tokenizer alone.
            eos_token_ids=eos_token_ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()),
            defaults=defaults,
            created=int(time.time()),
        )
        return model, tokenizer

    def _start_authenticator(self) -> Authenticator:
        settings = self._settings
        flags = ring_of_keys(key.get_secret_value() for key in settings.api_key)
        files = TenantFiles(settings.api_key_file, settings.tenants_file)
        authenticator = Authenticator(ring={**files.read(), **flags})

        def use(ring: Ring) -> None:
            authenticator.replace({**ring, **flags})
            self._deps.tenants.keep_only(authenticator.tenants)

        if authenticator.needs_key:
            self._stack.callback(asyncio.create_task(files.watch(use), name="watch-keys").cancel)
        return authenticator

    def _start_operators(self) -> Authenticator:
        """Who may use the admin listener: without a file whoever reaches it, which the settings allow on loopback only."""
        path = self._settings.admin_key_file
        if path is None:
            return Authenticator()
        files = TenantFiles([path], None)
        operators = Authenticator(ring=files.read())
        self._stack.callback(asyncio.create_task(files.watch(operators.replace), name="watch-admin-keys").cancel)
        return operators

    async def _start_bus(self) -> None:
        settings, stack = self._settings, self._stack
        self._bus: Bus = make_bus(settings, self._identity.worker_id)
        stack.push_async_callback(self._bus.close)
        stack.push_async_callback(self._registry.close)
        Discovery(self._bus, Subjects(settings.cluster), self._identity, self._registry, self._prefix_index)
        await self._bus.start()
        asking = asyncio.create_task(self._registry.ask_silent(), name="ask-silent")
        stack.callback(asking.cancel)
        prober = LinkProber(
            self._registry,
            self._links,
            clock=time.monotonic,
            on_probed=self._on_probed,
            open_channel=self._open_channel,
        )
        stack.callback(asyncio.create_task(prober.run(), name="probe-links").cancel)
        for address in settings.worker:
            watch = asyncio.create_task(self._registry.watch_static(address), name=f"static-{address}")
            stack.callback(watch.cancel)

    async def _start_grpc(self, server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(self._deps), server)
        self._health.add_to(server)
        names = [*runtime_grpc.service_names(inference_pb2.DESCRIPTOR)]
        if self._settings.failpoints:
            names += enable_failpoints(self._settings.failpoints, server, "gateway")
        runtime_grpc.enable_reflection(server, [*names, SERVICE_NAME])
        self._stack.push_async_callback(server.stop, 0.5)
        await server.start()

    def _start_http(self, listener: socket.socket, admin_listener: socket.socket | None) -> None:
        deps, stack = self._deps, self._stack
        max_header_bytes = deps.limits.max_header_bytes
        self._http = []
        if admin_listener is not None:
            admin_app = create_admin_app(deps, self._start_operators())
            self._http.append(HttpServer(admin_app, admin_listener, "admin", max_header_bytes))
        # Where other machines reach the port, what changes the installation is on the admin listener alone.
        app = create_app(deps, with_operators=is_loopback(self._settings.host))
        self._http.append(HttpServer(app, listener, "http", max_header_bytes, self._public_tls))
        for server in self._http:
            stack.push_async_callback(server.stop)
        stack.callback(deps.cut.set)  # before the server closes connections: streams end with a word

    async def wait_failed(self) -> None:
        # Whoever gives up waiting must not cancel the servers with it, and ``wait`` does not.
        done, _ = await asyncio.wait([server.task for server in self._http], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def drain(self) -> None:
        self._health.set_draining()
        self._deps.door.close()
        while self._deps.door.num_inside:  # noqa: ASYNC110  counted where the requests are, not here
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await self._stack.aclose()

    # What the rest of the gateway tells the process.

    def _on_probed(self) -> None:
        self._readiness.check(self._registry.views())

    def _on_heard(self) -> None:
        # A pair counts as seen even when nobody asks just then. Looking takes a while with many workers; they report often.
        now = time.monotonic()
        if not self._readiness.has_seen_pair and now >= self._look_s:
            self._readiness.check(self._registry.views())
            self._look_s = now + _LOOK_EVERY_S
        # Reports are up to a second old: what of it this gateway sent itself is known better here.
        reported = self._registry.reported
        self._others_tokens = max(0, reported.waiting_tokens - self._deps.admission.control.ahead_tokens)
        if Placement(self._settings.placement) is Placement.AUTO:  # else prompts beside streams have nowhere else to go
            self._deps.admission.control.prompt_share = reported.prompt_share
        # The context length that every usable worker can serve, unless the operator set one.
        length = reported.max_model_len
        if self._settings.max_model_len is None and length and length != self._deps.model.max_model_len:
            self._deps.model = replace(self._deps.model, max_model_len=length)

    def _ready(self) -> tuple[bool, str]:
        if self._health.is_draining:
            return False, "draining"
        return self._readiness.check(self._registry.views())

    def _needs_pair(self) -> bool:
        """False when decode workers are to prefill: told so, or the workers are named one by one and none is for prefill."""
        if Placement(self._settings.placement) is Placement.LOCAL:
            return False
        is_static = not self._settings.nats_url and self._registry.knows_all_static
        return not is_static or any(known.link.role is Role.PREFILL for known in self._registry)

    def _render_metrics(self) -> bytes:
        self._metrics.fenced(self._registry.num_fenced)
        self._metrics.handover_threshold(self._experience.threshold_tokens(self._registry, self._links))
        self._metrics.bus_state(self._bus.is_connected, dict(self._bus.num_dropped))
        return self._metrics.render()

    def _num_waiting(self) -> int:
        """Requests that no worker has yet."""
        return self._deps.admission.control.num_waiting + self._dispatcher.num_waiting

    def _on_refused(self, refusal: Refusal) -> None:
        if refusal.code in _REFUSED:
            self._metrics.request_refused(refusal.slo.slo_class)

    def _describe_decisions(self) -> dict[str, object]:
        return self._experience.describe(self._registry, self._links, self._settings.placement)

    def _on_end(self, record: GenerationRecord) -> None:
        metrics = self._metrics
        assert record.outcome is not None
        comparison = self._experience.learn(record)
        if comparison is not None:
            metrics.compared(comparison)
        _log_end(record)
        metrics.request_ended(record.trace, record.outcome, completion_tokens=record.completion_tokens)
        if record.attempts:
            metrics.placed(record.attempts[-1].decision.chosen.mode.value)
            metrics.prompt_computed(prompt_tokens=record.prompt_tokens, cached_tokens=record.cached_tokens)
        for attempt in record.attempts[:-1]:
            metrics.retried(attempt.outcome)
        for rung in record.fallbacks:
            metrics.fell_back(rung)
        if record.transfer is not None:
            metrics.kv_transferred(record.transfer)
        if record.fetch is not None:
            metrics.kv_fetched(record.fetch)
        if not record.is_first:  # a response with several choices is one request
            return
        if record.slo_met:
            metrics.slo_met(record.slo.slo_class)
        else:
            metrics.slo_missed(record.slo.slo_class, record.missed_because)


def _log_end(record: GenerationRecord) -> None:
    """One line for a generation, with the id that its workers' lines have; of the good ones only for who asks for details."""
    chosen = record.attempts[-1].decision.chosen if record.attempts else None
    write = log.info if record.outcome == "error" else log.debug
    write(
        "request ended",
        request_id=record.request_id,
        outcome=record.outcome,
        prefill=chosen.prefill.worker_id if chosen is not None and chosen.prefill is not None else None,
        decode=chosen.decode.worker_id if chosen is not None else None,
        attempts=len(record.attempts),
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        ttft_ms=record.trace.ttft_ms,
        e2e_ms=record.trace.e2e_ms,
    )


def _context_length(folder: Path) -> int:
    """The model's own limit, until workers say what they serve."""
    config = ConfigFile.read(folder / "config.json")
    for field in ("max_position_embeddings", "n_positions"):
        if field in config:
            return config.integer(field)
    return config.integer("max_position_embeddings")  # refuses, and names it
