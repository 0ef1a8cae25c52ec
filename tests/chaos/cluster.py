"""An installation of real processes on this machine: NATS, workers and a gateway, each link through a fault proxy.

Workers announce the ports of their proxies, so whatever is to reach them goes through those; NATS has one proxy for all. The
link of a connection is known by the process that opened it: ``gateway>decode-0:grpc``, ``prefill-1>decode-0:kv``,
``decode-0>nats:nats``.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from chaos.client import get, get_json
from chaos.descriptors import Held, held_by_process
from chaos.failpoints import set_failpoints
from chaos.processes import ManagedProcess
from chaos.socket_owner import owner_of
from helpers.fault_proxy import FaultBoard, FaultProxy

from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.api.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from baton.services.local.child import baton_argv, program_argv
from baton.services.local.nats_server import find_nats_server
from baton.services.runtime.grpc import create_channel
from baton.services.runtime.net import port_problem

START_TIMEOUT_S = 240.0  # five interpreters that import torch, on a machine that does other things too
_POLL_S = 0.1
_HELD_STATES = ("request", "transfer", "quarantine")
_PORTS = (15_000, 30_000)  # below those that systems give to connections
_taken_ports: set[int] = set()


@dataclass(frozen=True)
class Options:
    """What is started. ``workers`` and the rest hold settings by their option's name, with underscores."""

    prefill: int = 2
    decode: int = 2
    transport: str = "tcp"
    workers: Mapping[str, Any] = field(default_factory=dict)
    prefill_workers: Mapping[str, Any] = field(default_factory=dict)
    decode_workers: Mapping[str, Any] = field(default_factory=dict)
    gateway: Mapping[str, Any] = field(default_factory=dict)
    has_proxies: bool = True

    @property
    def key(self) -> str:
        """Equal for options that give equal installations."""
        return json.dumps({name: _plain(value) for name, value in vars(self).items()}, sort_keys=True)


_WORKER_DEFAULTS = {
    "dtype": "float32",
    "device": "cpu",
    "kv_cache_memory": "32MiB",
    "max_num_seqs": 48,
    "max_num_batched_tokens": 128,  # prompts take several chunks
    "threads_per_worker": 1,
    "failpoints": "on",
    "log_format": "json",
}


class ChaosCluster:
    """Use ``run_cluster``."""

    def __init__(self, options: Options, model: Path, directory: Path) -> None:
        self.options, self.model, self.directory = options, model, directory
        self.board = FaultBoard()
        self.proxies: dict[tuple[str, str], FaultProxy] = {}  # by name and kind
        self.port = _port()
        self._nats_port = _port()
        (directory / "block-key").write_bytes(b"a key of the chaos tests")
        (directory / "block-key").chmod(0o600)
        self.processes: dict[str, ManagedProcess] = {}
        self._ports: dict[str, int] = {}  # of the workers' gRPC servers
        self._kv_ports: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def direct_address(self, name: str) -> str:
        """A worker's gRPC address behind its proxy."""
        return f"127.0.0.1:{self._ports[name]}"

    @property
    def worker_names(self) -> list[str]:
        return [f"prefill-{i}" for i in range(self.options.prefill)] + [
            f"decode-{i}" for i in range(self.options.decode)
        ]

    async def start(self) -> None:
        nats_argv = program_argv(find_nats_server(), "--addr", "127.0.0.1", "--port", str(self._nats_port))
        self._add("nats", nats_argv)
        nats = await self._proxy("nats", "nats", self._nats_port)
        for name in self.worker_names:
            await self.add_worker(name)
        flags = {
            "host": "127.0.0.1",
            "port": self.port,
            "grpc_port": 0,
            "model": self.model,
            "served_model_name": "tiny",
            "nats_url": f"nats://127.0.0.1:{nats}",
            "block_key_file": self.directory / "block-key",
            "log_format": "json",
            **self.options.gateway,
        }
        self._add("gateway", baton_argv("gateway", *_flags(flags)))
        for process in self.processes.values():
            await process.start()
        await self.wait_ready()

    async def add_worker(self, name: str, worker_id: str | None = None, **settings: Any) -> ManagedProcess:
        """Prepares a worker; a name's role is the part before its number. ``worker_id``: an id other than the name."""
        role = name.rpartition("-")[0]
        port, kv_port = _port(), _port()
        self._ports[name], self._kv_ports[name] = port, kv_port
        nats = self.proxies.get(("nats", "nats"))
        flags = {
            **_WORKER_DEFAULTS,
            "model": self.model,
            "served_model_name": "tiny",
            "nats_url": f"nats://127.0.0.1:{nats.port if nats else self._nats_port}",
            "block_key_file": self.directory / "block-key",
            "worker_id": worker_id or name,
            "port": port,
            "kv_port": kv_port,
            "transport": self.options.transport,
            **self.options.workers,
            **(self.options.prefill_workers if role == "prefill" else self.options.decode_workers),
            **settings,
        }
        if self.options.has_proxies:
            flags["advertise_port"] = await self._proxy(name, "grpc", port)
            flags["advertise_kv_port"] = await self._proxy(name, "kv", kv_port)
        return self._add(name, baton_argv("prefill" if role == "prefill" else "decode", *_flags(flags)))

    def _add(self, name: str, argv: list[str]) -> ManagedProcess:
        process = self.processes[name] = ManagedProcess(name, argv, self.directory / f"{name}.log")
        return process

    async def _proxy(self, name: str, kind: str, port: int) -> int:
        """The port by which ``port`` is to be reached."""
        if not self.options.has_proxies:
            return port
        proxy = FaultProxy(self.board, name, kind, ("127.0.0.1", port), who=lambda p: self._source(p, proxy.port))
        await proxy.start()
        self.proxies[name, kind] = proxy
        return proxy.port

    def _source(self, port: int, proxy_port: int) -> str:
        """The process behind a connection; "client" for any other, and for one that has gone already."""
        running = {process.pid: name for name, process in self.processes.items() if process.is_running}
        pid = owner_of(port, proxy_port, running)
        return "client" if pid is None else running[pid]

    async def remove_worker(self, name: str) -> None:
        """Ends a worker that is not one of the installation's own."""
        process = self.processes.pop(name)
        await process.end()
        for key in [key for key in self.proxies if key[0] == name]:
            await self.proxies.pop(key).close()

    async def heal(self) -> None:
        """No faults, every process running, every worker known by its newest incarnation and ready."""
        self.board.clear()
        for name in [name for name in self.processes if name not in (*self.worker_names, "nats", "gateway")]:
            await self.remove_worker(name)
        for process in self.processes.values():
            process.signal(signal.SIGCONT)
            if not process.is_running:
                await process.start()
        await self.wait_ready()
        for name in self.worker_names:
            await set_failpoints(self, name, "on")

    async def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not await self._is_ready():
            for process in self.processes.values():
                assert process.is_running, f"{process.name} ended with {process.exit_status}:\n{process.log_tail()}"
            assert time.monotonic() < deadline, f"not ready in {timeout_s:.0f} s: {await self.states()}"
            await asyncio.sleep(_POLL_S)

    async def _is_ready(self) -> bool:
        workers = {worker["id"]: worker for worker in await self.workers()}
        return all(
            name in workers
            and workers[name]["state"] == "ready"
            and workers[name]["pid"] == self.processes[name].pid
            and workers[name]["role"] == name.rpartition("-")[0]
            for name in self.worker_names
        )

    async def workers(self) -> list[dict[str, Any]]:
        """``GET /v1/workers``; empty while the gateway does not answer."""
        try:
            return list((await get_json(self.url, "/v1/workers"))["data"])
        except (OSError, TimeoutError, ValueError, EOFError):
            return []

    async def states(self) -> dict[str, str]:
        return {worker["id"]: worker["state"] for worker in await self.workers()}

    async def held(self) -> Counter[str]:
        """What should be 0 once load has stopped and leases have run out, by worker and name. Only what is not.

        Each worker that runs is asked itself. What the gateway shows has to agree, where it hears of the workers at all.
        """
        held: Counter[str] = Counter()
        for name in self.worker_names:
            if self.processes[name].is_running:
                held.update(await held_on(name, self.direct_address(name)))
        if held or not self.processes["nats"].is_running:
            return held
        for worker in await self.workers():
            blocks = worker["kv_blocks"]
            counts = {name: blocks[name] for name in _HELD_STATES}
            counts |= {name: worker[name] for name in ("overdue", "queued", "running", "ledger_error")}
            counts["unaccounted"] = blocks["total"] - sum(n for state, n in blocks.items() if state != "total")
            held.update({f"{worker['id']} {name}, shown": abs(number) for name, number in counts.items() if number})
        return held

    def descriptors(self) -> dict[tuple[str, int], Held]:
        """What each running process holds of the system, by name and pid."""
        listened = {port: f"{name}:grpc" for name, port in self._ports.items()}
        listened |= {port: f"{name}:kv" for name, port in self._kv_ports.items()}
        listened |= {self._nats_port: "nats:nats", self.port: "gateway:http"}
        reached = {proxy.port: f"{name}:{kind}" for (name, kind), proxy in self.proxies.items()} or listened
        running = [(name, process) for name, process in self.processes.items() if process.is_running]
        return {
            (name, process.pid): held_by_process(
                process.pid, reached, {port: end for port, end in listened.items() if end.startswith(f"{name}:")}
            )
            for name, process in running
        }

    async def metrics(self) -> dict[str, float]:
        """``GET /metrics``: every sample by its name and labels."""
        samples: dict[str, float] = {}
        _, body = await get(self.url, "/metrics")
        for line in body.decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name and not name.startswith("#"):
                with suppress(ValueError):
                    samples[name] = float(value)
        return samples

    async def stop(self) -> dict[str, int | None]:
        """Ends everything, workers last but NATS, and returns the exit statuses."""
        self.board.clear()
        names = ["gateway", *[name for name in self.processes if name not in ("gateway", "nats")], "nats"]
        running = [name for name in names if name in self.processes and self.processes[name].num_starts]
        statuses = {name: await self.processes[name].end() for name in running}
        for proxy in self.proxies.values():
            await proxy.close()
        return statuses


@asynccontextmanager
async def run_cluster(options: Options, model: Path) -> AsyncIterator[ChaosCluster]:
    """Starts an installation and ends it; no process of it is left, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="baton-chaos-") as directory:
        cluster = ChaosCluster(options, model, Path(directory))
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.stop()


async def held_on(name: str, address: str) -> Counter[str]:
    """What a worker says that it holds. One that does not answer holds something as well."""
    async with create_channel(address) as channel:
        try:
            if name.startswith("prefill"):
                prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
                status = (await prefill.GetStatus(prefill_pb2.GetStatusRequest(), timeout=5.0)).status
            else:
                decode = decode_pb2_grpc.DecodeServiceStub(channel)
                status = (await decode.GetStatus(decode_pb2.GetStatusRequest(), timeout=5.0)).status
        except grpc.aio.AioRpcError as error:
            return Counter({f"{name} answers {error.code().name}": 1})
    counts = {state: getattr(status.kv_blocks, state) for state in _HELD_STATES}
    counts |= {field: getattr(status, field) for field in ("overdue", "queued", "running", "ledger_error")}
    return Counter({f"{name} {what}": abs(number) for what, number in counts.items() if number})


def _flags(settings: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(option if value else "--no-" + option[2:])
        else:
            flags += [option, str(value)]
    return flags


def _port() -> int:
    """A free port that no connection gets as its own: it has to be free again whenever its process is started again."""
    while True:
        port = random.randint(*_PORTS)
        if port not in _taken_ports and port_problem("127.0.0.1", port, "") is None:
            _taken_ports.add(port)
            return port


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
