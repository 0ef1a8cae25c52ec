"""Runs one variant of a scenario on a running cluster: load, faults at their moments, and what is left afterwards."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from chaos.client import get_json
from chaos.cluster import ChaosCluster
from chaos.descriptors import Held, more_held
from chaos.failpoints import set_failpoints
from chaos.load import Exchange, Reference, Shape, make_exchanges, run_load
from chaos.probes import PROBES
from chaos.results import Result, judge
from chaos.scenario import Scenario, Step
from helpers.fault_proxy import Fault

from baton.services.core.failpoints import parse_failpoints

_POLL_S = 0.01
_STEP_TIMEOUT_S = 120.0
_SAME_AGAIN_S = 20.0  # for descriptors of connections that end by themselves
_TOLD_AGAIN_S = 15.0  # by then every worker has said how it is
# What a worker opens with its first requests is open before and after.
_WARM_UP = Shape(requests=24, streams=8, prompt_tokens=(20, 120), max_tokens=(4, 12), seed=999)


class Run:
    """One variant. ``name`` is unique among all runs on the cluster."""

    def __init__(self, cluster: ChaosCluster, scenario: Scenario, reference: Reference, name: str) -> None:
        self.cluster, self.scenario, self.reference, self.name = cluster, scenario, reference, name
        self.exchanges: list[Exchange] = []
        self.result = Result()
        self.faults: list[Fault] = []
        self._load: asyncio.Task[None] | None = None
        self._memory: dict[tuple[str, int], int] = {}
        self._pieces_before: dict[str, int] = {}
        self._gone: dict[str, float] = {}  # worker -> when the gateway took it for gone
        self._faulted_s: dict[str, float] = {}
        self._expected_ends: set[tuple[str, int]] = set()  # (process, pid) that we ended ourselves
        self._failpoint_pids: dict[str, int] = {}
        self._points: dict[str, set[str]] = {}  # process -> failpoints that have rules there

    async def execute(self, steps: Sequence[Step]) -> Result:
        cluster, shape = self.cluster, self.scenario.load
        asks = await self.reference.make_asks(cluster.url, shape)
        await warm_up(cluster, self.reference, f"{self.name}-before")
        before = cluster.descriptors()
        self._pieces_before = dict(cluster.board.num_pieces)
        fenced, corrupt = await self._counted("fenced_total"), await self._counted("corrupt_blocks_total")
        self.exchanges = make_exchanges(shape, asks, self.name)
        watches = [
            asyncio.create_task(work) for work in (self._watch_workers(), self._supervise(), self._measure_memory())
        ]
        try:
            self._load = asyncio.create_task(run_load(cluster.url, shape, self.exchanges, len(asks), self.name))
            for step in steps:
                await self._until(step.when)
                await self._do(step)
            await self._load
        finally:
            self._load.cancel()
            for watch in watches:
                watch.cancel()
            await asyncio.gather(self._load, *watches, return_exceptions=True)
        counted = judge(self.exchanges, self.reference)
        counted.add(self.result)
        self.result = counted
        self.result.injected += sum(sum(fault.done.values()) for fault in self.faults)
        for name, pid in list(self._failpoint_pids.items()):
            process = self.cluster.processes[name]
            if process.is_running and process.pid == pid:  # one that was started again has none, and may not listen yet
                await self._set_failpoints(name, "on")
        self.result.fenced += await self._more("fenced_total", fenced)
        await self._count_flips(corrupt)
        await self._count_retries()
        self._measure_recovery()
        await self._count_leaks(before)
        return self.result

    # Triggers.

    async def _until(self, when: Mapping[str, Any]) -> None:
        started_s = time.monotonic()
        while not await self._is_time(when, started_s):
            if time.monotonic() - started_s > _STEP_TIMEOUT_S:
                raise TimeoutError(f"{self.name}: {dict(when)} did not come")
            await asyncio.sleep(_POLL_S)

    async def _is_time(self, when: Mapping[str, Any], started_s: float) -> bool:
        answers = [exchange.answer for exchange in self.exchanges]
        assert self._load is not None
        checks = {
            "seconds": lambda n: time.monotonic() - started_s >= n,
            "sent": lambda n: sum(answer.sent_s > 0 for answer in answers) >= n,
            "tokens": lambda n: sum(len(answer.token_ids) for answer in answers) >= n,
            "ended": lambda n: sum(answer.ended_s > 0 for answer in answers) >= n,
            "streaming": lambda n: sum(bool(a.token_ids) and not a.ended_s for a in answers) >= n,
            "pieces": lambda v: self._pieces(v["link"]) >= v["at_least"],
        }
        if self._load.done() and set(when) & {"sent", "tokens", "ended", "streaming", "pieces", "running"}:
            return True  # it will not come any more
        for name, value in when.items():
            if name == "load_ended":
                await asyncio.wait([self._load])
            elif name in ("state", "queued", "running"):
                workers = {worker["id"]: worker for worker in await self.cluster.workers()}
                worker = workers.get(value["worker"])
                if name == "state" and (worker["state"] if worker else "unknown") not in value["is"]:
                    return False
                if name != "state" and (worker is None or worker[name] < value["at_least"]):
                    return False
            elif not checks[name](value):
                return False
        return True

    def _pieces(self, link: str) -> int:
        """Those of this run."""
        board = self.cluster.board
        return board.pieces(link) - sum(n for name, n in self._pieces_before.items() if fnmatchcase(name, link))

    # Actions.

    async def _do(self, step: Step) -> None:
        arguments = step.arguments
        match step.action:
            case "signal":
                await self._signal(_names(arguments["process"]), getattr(signal, f"SIG{arguments['signal']}"))
            case "start":
                for name in _names(arguments):
                    if not self.cluster.processes[name].is_running:
                        await self.cluster.processes[name].start()
            case "fault":
                values = dict(arguments)
                self.faults.append(self.cluster.board.set(values.pop("link"), Fault(**values)))
            case "clear":
                self.cluster.board.clear(arguments)
            case "failpoint":
                for name in _names(arguments["process"]):
                    await self._set_failpoints(name, arguments["rules"])
                    if "=hang" in arguments["rules"]:
                        self._faulted_s[name] = time.monotonic()
            case "add_worker":
                process = await self.cluster.add_worker(
                    arguments["name"], arguments.get("id"), **arguments.get("settings", {})
                )
                await process.start()
            case "wait_ready":
                await self.cluster.wait_ready()
            case "pause":
                await asyncio.sleep(float(arguments))
            case "probe":
                names = [arguments] if isinstance(arguments, str) else arguments
                for name in names:
                    self._note_probe(name, await PROBES[name](self.cluster, self))
            case other:
                raise ValueError(f"unknown action {other}")

    async def _signal(self, names: list[str], number: signal.Signals) -> None:
        """All of them at once."""
        processes = [self.cluster.processes[name] for name in names]
        for process in processes:
            if number in (signal.SIGKILL, signal.SIGTERM):
                self._expected_ends.add((process.name, process.pid))
            if number != signal.SIGCONT:
                self._faulted_s[process.name] = time.monotonic()
            process.signal(number)
        if number == signal.SIGKILL:
            for process in processes:
                await process.wait()

    async def _set_failpoints(self, name: str, rules: str) -> None:
        """Counts how often those before were reached; of a process that ended meanwhile nobody knows."""
        reached = await set_failpoints(self.cluster, name, rules)
        self.result.injected += sum(reached.get(point, 0) for point in self._points.get(name, ()))
        self._failpoint_pids[name] = self.cluster.processes[name].pid
        self._points[name] = {rule.point for rule in parse_failpoints(rules)}

    def _note_probe(self, name: str, problem: str) -> None:
        if problem:
            self.result.wrong += 1
            self.result.notes.append(f"probe {name}: {problem}")

    # Beside the load.

    async def _watch_workers(self) -> None:
        """Notes when the gateway no longer counts on a worker that something was done to."""
        while True:
            watched = [name for name in self._faulted_s if name not in self._gone and name in self.cluster.worker_names]
            if watched:
                states = await self.cluster.states()
                now_s = time.monotonic()
                for name in watched:
                    if states and states.get(name, "unknown") != "ready":
                        self._gone[name] = now_s
            await asyncio.sleep(0.05)

    async def _supervise(self) -> None:
        """Counts what ends by itself, and starts again what ended where the scenario has a supervisor."""
        while True:
            for name, process in list(self.cluster.processes.items()):
                if process.num_starts and not process.is_running:
                    key = (name, process.pid)
                    if key not in self._expected_ends:
                        self._expected_ends.add(key)
                        self.result.crashes += 1
                    if self.scenario.restarts:
                        await asyncio.sleep(0.2)
                        with suppress(AssertionError):  # a step was faster
                            await process.start()
            await asyncio.sleep(0.05)

    # Afterwards.

    async def _count_flips(self, before: dict[str, int]) -> None:
        """What went wrong on purpose, and what the workers say of it, which they do every now and then."""
        flipped = sum(fault.done["flip"] for fault in self.faults)
        until_s = time.monotonic() + _TOLD_AGAIN_S
        while (corrupt := await self._more("corrupt_blocks_total", before)) < flipped and time.monotonic() < until_s:
            await asyncio.sleep(0.2)
        self.result.flipped += flipped
        self.result.corrupt += corrupt

    async def _counted(self, name: str) -> dict[str, int]:
        """What each worker has counted, by incarnation."""
        return {worker["incarnation"]: int(worker[name]) for worker in await self.cluster.workers()}

    async def _more(self, name: str, before: dict[str, int]) -> int:
        """How much more than before, together."""
        return sum(number - before.get(incarnation, 0) for incarnation, number in (await self._counted(name)).items())

    async def _count_retries(self) -> None:
        if "gateway" in self._faulted_s:
            return  # the receipts are gone with it
        for exchange in self.exchanges:
            with suppress(OSError, ValueError, KeyError, TimeoutError, EOFError):
                receipt = await get_json(self.cluster.url, f"/v1/requests/{exchange.request_id}")
                self.result.retries += receipt["retries"]

    def _measure_recovery(self) -> None:
        """Detection: from the fault until the gateway stops counting on the worker. Recovery: from then until every stream
        that was under way has its next token."""
        for name, faulted_s in self._faulted_s.items():
            if name not in self.cluster.worker_names:
                continue
            gone_s = self._gone.get(name)
            if gone_s is not None:
                self.result.detection_s = max(self.result.detection_s or 0.0, gone_s - faulted_s)
            self._measure_gaps(faulted_s if gone_s is None else gone_s)

    def _measure_gaps(self, since_s: float) -> None:
        for exchange in self.exchanges:
            times = exchange.answer.token_s
            if not times or times[0] > since_s or exchange.answer.hung_up:
                continue
            later = next((token_s for token_s in times if token_s > since_s), None)
            if later is not None:
                self.result.recovery_s = max(self.result.recovery_s or 0.0, later - since_s)

    async def _measure_memory(self) -> None:
        """What each process has to itself when buffers and caches have their size, and the gateway its receipts."""
        while sum(exchange.answer.ended_s > 0 for exchange in self.exchanges) < self.scenario.expect.growth_from:
            await asyncio.sleep(0.2)
        self._memory = private_bytes(self.cluster)

    async def _count_leaks(self, before: dict[tuple[str, int], Held]) -> None:
        cluster, result = self.cluster, self.result
        started_s = time.monotonic()
        while (held := await cluster.held()) and time.monotonic() - started_s < self.scenario.expect.clean_s:
            await asyncio.sleep(0.1)
        result.clean_s = time.monotonic() - started_s
        result.leaked += sum(held.values())
        result.notes += [f"still held: {name} {number}" for name, number in held.items()]
        now = private_bytes(cluster)
        growth = {key: now[key] / self._memory[key] for key in self._memory.keys() & now.keys()}
        result.growth = max(growth.values(), default=None)
        if self.scenario.expect.max_growth is not None:
            result.notes += [
                f"memory of {key[0]}: {now[key] >> 20} MiB, {factor:.3f} of before" for key, factor in growth.items()
            ]
        if self.scenario.heals:
            await cluster.heal()
            await warm_up(cluster, self.reference, f"{self.name}-after")
        started_s = time.monotonic()
        while (more := more_held(before, cluster.descriptors())) and time.monotonic() - started_s < _SAME_AGAIN_S:
            await asyncio.sleep(0.2)
        result.leaked += sum(more.values())
        result.notes += [f"still open: {name} {number}" for name, number in more.items()]


async def warm_up(cluster: ChaosCluster, reference: Reference, name: str) -> None:
    """A short load without faults, whose answers have to be right as well."""
    asks = await reference.make_asks(cluster.url, _WARM_UP)
    exchanges = make_exchanges(_WARM_UP, asks, name)
    await run_load(cluster.url, _WARM_UP, exchanges, len(asks), name)
    result = judge(exchanges, reference)
    assert not any((result.failed, result.wrong, result.lost, result.doubled)), result.notes


def private_bytes(cluster: ChaosCluster) -> dict[tuple[str, int], int]:
    """Memory that each running process of ours shares with nobody, by name and pid."""
    running = [(name, p) for name, p in cluster.processes.items() if p.is_running and name != "nats"]
    return {(name, process.pid): process.private_bytes() for name, process in running}


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
