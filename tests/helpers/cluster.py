"""A whole installation in one process: real workers, gRPC, data sockets and shared memory, and the dispatcher.

What differs from ``baton serve`` is that the processes are objects on one event loop, the bus is the in-process one, and
all workers share one copy of the weights.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from helpers.waiting import eventually
from pydantic import ByteSize

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.block_hash import BlockNamer
from baton.services.core.cost_learning import CostBook
from baton.services.core.fetch import FetchPolicy
from baton.services.core.lifecycle import Instant
from baton.services.core.links import LinkMatrix
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.request import FinishReason, SampledToken, SamplingParams
from baton.services.core.router import Placement
from baton.services.decode.__main__ import DecodeHost
from baton.services.engine.loader import LoadedModel
from baton.services.gateway.discovery import Discovery
from baton.services.gateway.dispatch import WorkerDispatcher
from baton.services.gateway.generation import GenerationRequest, SloTarget
from baton.services.gateway.receipts import GenerationRecord, ReceiptBook
from baton.services.gateway.registry import Registry
from baton.services.prefill.__main__ import PrefillHost
from baton.services.runtime.bus import Bus, InProcessBus
from baton.services.runtime.settings import WorkerSettings
from baton.services.runtime.subjects import Subjects
from baton.services.worker.host import WorkerHost

BLOCK_KEY = b"a key of the tests"
_ids = itertools.count()


@dataclass
class Generated:
    """What the client got."""

    tokens: list[SampledToken] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None
    receipt_id: str = ""

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class Cluster:
    """Workers and a dispatcher. Use ``run_cluster``."""

    def __init__(
        self,
        placement: Placement = Placement.REMOTE,
        fetch: FetchPolicy | None = None,
        bus: Bus | None = None,
        costs: CostBook | None = None,
        slo: SloTarget | None = None,
    ) -> None:
        self.slo = slo or SloTarget()
        self.bus = bus or InProcessBus()
        self.hosts: list[WorkerHost[Any]] = []
        self.gateway = pb.WorkerIdentity(worker_id="gateway", incarnation=uuid.uuid4().hex)
        self.prefix_index = PrefixIndex()
        self.ended: list[GenerationRecord] = []
        self.receipts = ReceiptBook(self.ended.append)
        forget = self.prefix_index.forget
        self.registry = Registry(self.gateway, clock=time.monotonic, on_forget=forget, costs=costs)
        self.discovery = Discovery(self.bus, Subjects("test"), self.gateway, self.registry, self.prefix_index)
        self.links = LinkMatrix()  # nobody probes here unless a test does
        self.dispatcher = WorkerDispatcher(
            self.registry,
            self.prefix_index,
            BLOCK_KEY,
            self.receipts,
            clock=time.monotonic,
            placement=placement,
            fetch=fetch,
            links=self.links,
        )

    def host(self, role: str) -> WorkerHost[Any]:
        """The first worker of a role."""
        return next(host for host in self.hosts if host.settings.role == role)

    async def generate(
        self, prompt: Sequence[int], *, max_tokens: int = 24, timeout_s: float = 60.0, **sampling: Any
    ) -> Generated:
        """Runs one request to its end. Greedy unless ``sampling`` says otherwise."""
        name = f"test-{next(_ids)}"
        cache_salt = sampling.pop("cache_salt", "")
        params = replace(SamplingParams(max_tokens=max_tokens, temperature=0.0), **sampling)
        request = GenerationRequest(
            name, name, "test", list(prompt), params, cache_salt, timeout_s=timeout_s, slo=self.slo
        )
        for instant in (Instant.RECEIVED, Instant.ADMITTED, Instant.TOKENIZED):  # what the API layer does
            request.trace.mark(instant, time.monotonic())
        generated = Generated(receipt_id=name)
        async for delta in self.dispatcher.generate(request):
            generated.indices += range(delta.first_index, delta.first_index + len(delta.tokens))
            generated.tokens += delta.tokens
            generated.finish_reason = delta.finish_reason
            if delta.cached_tokens is not None:
                generated.cached_tokens = delta.cached_tokens
        return generated

    async def generate_all(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Generated]:
        """Runs all at once."""
        return list(await asyncio.gather(*(self.generate(prompt, **sampling) for prompt in prompts)))

    async def statuses(self) -> list[pb.WorkerStatus]:
        return [await host.status() for host in self.hosts]

    async def is_clean(self) -> bool:
        """Nothing is held and nothing is wrong on any worker."""
        for status in await self.statuses():
            blocks = status.kv_blocks
            if blocks.request or blocks.transfer or blocks.quarantine or status.overdue or status.ledger_error:
                return False
            if status.running or status.queued:
                return False
        # A request that never held a block ends on its worker when the gateway's word arrives, which may be a moment later.
        return all(host.worker is not None and host.worker.num_active == 0 for host in self.hosts)

    async def assert_clean(self, timeout_s: float = 10.0) -> None:
        """The ledger of every worker shows nothing held, soon."""
        deadline = time.monotonic() + timeout_s
        while not await self.is_clean():
            assert time.monotonic() < deadline, f"blocks are still held: {await self.statuses()}"
            await asyncio.sleep(0.02)
        for host in self.hosts:
            assert host.worker is not None
            await host.worker.steps.call(lambda scheduler: scheduler.pool.check_integrity())

    async def block_bytes(self, role: str, prompt: Sequence[int], cache_salt: str = "") -> dict[bytes, bytes]:
        """The bytes of the prompt's full blocks in that worker's cache, by name."""
        host = self.host(role)
        assert host.worker is not None
        engine, pool = host.worker._parts.engine, host.worker._parts.pool
        namer: BlockNamer = host.worker._parts.namer
        names = namer.names(list(prompt), pool.block_size, cache_salt)[: len(prompt) // pool.block_size]

        def read(scheduler: Any) -> dict[bytes, bytes]:
            ids = pool.lookup(names)
            return {
                name: engine.kv_cache[block_id].contiguous().view(-1).view(_BYTE).cpu().numpy().tobytes()  # type: ignore[attr-defined]
                for name, block_id in zip(names, ids, strict=False)
            }

        found: dict[bytes, bytes] = await host.worker.steps.call(read)
        return found


@asynccontextmanager
async def run_cluster(
    loaded: LoadedModel,
    key_file: Any,
    *,
    mode: str = "disaggregated",
    transport: str = "auto",
    num_prefill: int = 1,
    num_decode: int = 1,
    num_blocks: int = 256,
    prefill_settings: dict[str, Any] | None = None,
    keep_stopped: bool = False,
    placement: Placement = Placement.REMOTE,
    fetch: FetchPolicy | None = None,
    bus: Bus | None = None,
    costs: CostBook | None = None,
    slo: SloTarget | None = None,
    **settings: Any,
) -> Any:
    """Starts an installation and stops it. ``mode``: "disaggregated" or "colocated".

    ``keep_stopped``: a worker that the test took out of ``hosts`` is the test's to stop. ``bus``: the gateway's, not yet
    started; workers then have their own, as the settings say.
    """
    cluster = Cluster(placement, fetch, bus, costs, slo)
    roles = ["colocated"] * num_decode if mode == "colocated" else ["prefill"] * num_prefill + ["decode"] * num_decode
    async with AsyncExitStack() as stack:
        if bus is not None:
            await bus.start()
            stack.push_async_callback(bus.close)
        for index, role in enumerate(roles):
            own = {**settings, **(prefill_settings or {} if role == "prefill" else {})}
            block_bytes = _block_bytes(loaded, own.get("block_size", 16))
            worker_settings = WorkerSettings(
                role=role,
                worker_id=f"{role}-{index}",
                cluster="test",
                transport=transport,
                kv_cache_memory=ByteSize(num_blocks * block_bytes),
                **{"nats_url": "none", "block_key_file": key_file, **own},
            )
            host_type = PrefillHost if role == "prefill" else DecodeHost
            host = host_type(worker_settings, load=lambda: loaded, bus=cluster.bus if bus is None else None)
            await host.start()
            stack.push_async_callback(_stop, cluster, host, keep_stopped)
            cluster.hosts.append(host)
        stack.push_async_callback(cluster.registry.close)
        await eventually(lambda: len(cluster.registry.views()) == len(roles), what="a link to every worker")
        yield cluster


async def _stop(cluster: Cluster, host: WorkerHost[Any], keep_stopped: bool) -> None:
    if host in cluster.hosts or not keep_stopped:
        await host.stop()


def _block_bytes(loaded: LoadedModel, block_size: int) -> int:
    from baton.services.engine.kv_cache import KVCacheShape

    return KVCacheShape.of(loaded.config, block_size, loaded.dtype).block_bytes


def _byte_dtype() -> Any:
    import torch

    return torch.uint8


_BYTE = _byte_dtype()
