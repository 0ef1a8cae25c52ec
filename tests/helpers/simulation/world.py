"""One simulated installation: machines, network, bus and clients, and one run of it from start to quiet."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import structlog
from helpers.simulation.bus import BusServer
from helpers.simulation.checks import check_quiet
from helpers.simulation.clients import GRACE_S, Client, Got
from helpers.simulation.clock import Stuck, VirtualLoop
from helpers.simulation.faults import Injector
from helpers.simulation.gateway import SimGateway
from helpers.simulation.network import Network
from helpers.simulation.scenario import Scenario, draw_scenario
from helpers.simulation.sockets import SimSockets
from helpers.simulation.trace import Trace
from helpers.simulation.worker import SimWorker

from baton.kvtransfer.transport import outlet, shm, stream
from baton.services.runtime import grpc as runtime_grpc

# After the load: a lease, and what it takes to notice that it has run out.
QUIET_S = 45.0
START_S = 15.0
RECOVERY_S = 30.0

# How a client's end is counted. One who leaves may do so a moment after the last token.
OUTCOMES = {
    "stop": {"stop"},
    "length": {"length"},
    "stopped": {"stop"},
    "error": {"error", "refused"},
    "left": {"abort", "stop", "length", "error"},
}


@dataclass
class Outcome:
    """What a seed showed."""

    seed: int
    problems: list[str]
    ends: Counter[str]
    codes: Counter[str]
    faults: Counter[str]
    num_tokens: int
    virtual_s: float
    num_callbacks: int
    trace: str = ""
    digest: str = ""
    counts: Counter[str] = field(default_factory=Counter)


class World:
    """Everything of one run, for faults to harm and for checks to look at."""

    def __init__(self, scenario: Scenario, loop: VirtualLoop, trace: Trace) -> None:
        self.scenario = scenario
        self.loop = loop
        self.trace = trace
        self.rng = random.Random(scenario.seed ^ 0x5EED)
        options = dict(runtime_grpc._CLIENT_OPTIONS)
        time_s, timeout_s = (options[f"grpc.{name}"] / 1e3 for name in ("keepalive_time_ms", "keepalive_timeout_ms"))
        self.network = Network(loop, self.rng, trace, (timeout_s, time_s + timeout_s))
        loop.thread_delay_s = lambda: self.rng.random() * scenario.thread_s
        self.bus = BusServer(self.network)
        self.sockets = SimSockets(self.network, scenario.socket_bytes, scenario.bytes_per_s)
        self.gateway = SimGateway(self.network, self.bus, scenario.placement)
        self.workers = [
            SimWorker(
                spec.role,
                spec.index,
                network=self.network,
                bus=self.bus,
                sockets=self.sockets,
                num_blocks=spec.num_blocks,
                step_s=spec.step_s,
                token_s=spec.token_s,
                settings=spec.settings,
            )
            for spec in scenario.workers
        ]
        self.clients: list[Client] = []
        self.problems: list[str] = []
        self.injector = Injector(self)

    def worker(self, name: str) -> SimWorker:
        return next(worker for worker in self.workers if worker.name == name)

    async def run(self) -> None:
        self.gateway.start()
        for worker in self.workers:
            worker.start()
        if not await self._until(lambda: self._num_views() == len(self.workers), START_S):
            self.problems.append(f"start: {self._num_views()} of {len(self.workers)} workers after {START_S:g} s")
            return
        start_s = self.loop.time()
        for ask in self.scenario.asks:
            ask.at_s += start_s
            self.clients.append(Client(ask, self.gateway, self.trace))
        runs = [self.loop.create_task(client.run()) for client in self.clients]
        self.injector.plan(start_s)
        longest_s = max(ask.at_s + ask.timeout_s for ask in self.scenario.asks) + GRACE_S
        if runs:
            await asyncio.wait(runs, timeout=longest_s + self.scenario.extra_s - self.loop.time())
        self.trace.note("world", "the load has ended")
        self._check_ends()
        await self.injector.heal()
        if not await self._until(lambda: not check_quiet(self), QUIET_S):
            self.problems += check_quiet(self)
            return
        await self._probe()

    async def _probe(self) -> None:
        """I7: once all faults are over everything is there again, and serves."""
        is_whole = await self._until(lambda: self._num_views() == len(self.workers), RECOVERY_S)
        if not is_whole:
            views = sorted(view.worker_id for view in self.gateway.registry.views())
            self.problems.append(f"I7 {RECOVERY_S:g} s after the last fault the gateway sees {views} alone")
            return
        self.trace.note("world", "probes")
        probes = [Client(ask, self.gateway, self.trace) for ask in self.scenario.probes]
        for client in probes:
            client.got.ask.at_s = self.loop.time()
        gots = await asyncio.gather(*(client.run() for client in probes))
        self.clients += probes
        for got in gots:
            self.problems += got.check_tokens()
            if got.end not in ("stop", "length"):
                self.problems.append(f"I7 {got.ask.name}: after the faults: {got.end} {got.code} {got.message}")
        if not await self._until(lambda: not check_quiet(self), QUIET_S):
            self.problems += check_quiet(self)

    def _num_views(self) -> int:
        return len(self.gateway.registry.views()) if hasattr(self.gateway, "registry") else 0

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline_s = self.loop.time() + timeout_s
        while not condition():
            if self.loop.time() >= deadline_s:
                return False
            await asyncio.sleep(0.25)
        return True

    def _check_ends(self) -> None:
        for got in self.gots:
            ask = got.ask
            if got.end is None:
                self.problems.append(f"I1 {ask.name}: not ended {GRACE_S:g} s after its deadline")
            elif got.ended_s - got.started_s > ask.timeout_s + GRACE_S:
                self.problems.append(f"I1 {ask.name}: ended {got.ended_s - got.started_s:.1f} s after its start")
            self.problems += got.check_tokens()
            if got.code == "internal_error" and not self.injector.counts["raise"]:
                self.problems.append(f"I8 {ask.name}: {got.code} without a cause: {got.message}")
            if self.scenario.has_spare and got.has_failed:
                self.problems.append(f"I7 {ask.name}: failed although there was a spare: {got.code} {got.message}")

        for worker in self.workers:
            self.problems += worker.turn_problems
        self._check_receipts()

    def _check_receipts(self) -> None:
        """I8: what the gateway has counted is what the clients saw, once each."""
        outcomes: dict[str, list[str | None]] = {}
        for record in self.gateway.ended:
            outcomes.setdefault(record.request_id, []).append(record.outcome)
            if not self.scenario.faults and len(record.attempts) > 1:
                self.problems.append(f"I7 {record.request_id}: took {record.fallbacks} although nothing failed")
        for got in self.gots:
            expected = OUTCOMES.get(got.end or "")
            counted = outcomes.get(f"{got.ask.name}.0", [])
            if expected is not None and (len(counted) != 1 or counted[0] not in expected):
                self.problems.append(f"I8 {got.ask.name}: the client saw {got.end}, the receipts say {counted}")

    @property
    def gots(self) -> list[Got]:
        return [client.got for client in self.clients]


def run_seed(seed: int, *, keep_trace: bool = False, make: Callable[[int], Scenario] = draw_scenario) -> Outcome:
    """Runs one seed. The same seed gives the same run, event by event."""
    scenario = make(seed)
    with _no_garbage_collection(), _threads_for_all(scenario):
        loop = VirtualLoop()
        trace = Trace(loop.time, keep=keep_trace)
        with _logs_to(trace):
            try:
                world = loop.run_until_complete(_run(scenario, loop, trace))
                num_callbacks, end_s = loop.num_callbacks, loop.time()
            finally:
                trace.is_kept = False  # the run is over; tasks are ended in an order that no seed decides
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that nobody will await any more
                    _close(loop)
    unplanned = [line for line in trace.errors if not _is_planned(line, world.injector.hung)]
    problems = world.problems + [f"I8 logged as an error: {line}" for line in unplanned]
    text = trace.text()
    return Outcome(
        seed,
        problems,
        Counter(got.end or "open" for got in world.gots),
        Counter(got.code for got in world.gots if got.code),
        world.injector.counts,
        sum(len(got.tokens) for got in world.gots),
        end_s,
        num_callbacks,
        text,
        hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        trace.counts,
    )


async def _run(scenario: Scenario, loop: VirtualLoop, trace: Trace) -> World:
    world = World(scenario, loop, trace)
    try:
        await world.run()
    except Stuck as error:
        world.problems.append(f"stuck: {error}")
    world.problems += [f"I8 unhandled: {failure}" for failure in loop.failures]
    world.network.is_over = True
    return world


def _is_planned(line: str, hung: Collection[str]) -> bool:
    """An error that a fault caused on purpose and that production rightly logs as one. ``hung``: machines whose steps hang;
    what waits for a step there is given up at last when the worker is drained."""
    where = line.partition(":")[0].partition(".")[0]
    if where in hung and "not waited for any longer" in line:
        return True
    return "engine step failed" in line or "the step loop is broken" in line or "service failed" in line


@contextlib.contextmanager
def _logs_to(trace: Trace) -> Iterator[None]:
    before = structlog.get_config()
    structlog.configure(processors=[trace.on_log], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting runs clean-up of forgotten coroutines at moments that no seed decides."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _threads_for_all(scenario: Scenario) -> Iterator[None]:
    """The blocks here are tiny. In some runs they go over threads nevertheless, as large ones do.

    A thread that finds a socket full waits a moment for room; here it always waits in vain.
    """
    before = outlet._INLINE_BYTES, shm._INLINE_BYTES
    wait_for_room = stream.FrameStream._wait_for_room
    stream.FrameStream._wait_for_room = lambda self: False  # type: ignore[method-assign]
    if scenario.thread_s:
        outlet._INLINE_BYTES = shm._INLINE_BYTES = 0
    try:
        yield
    finally:
        outlet._INLINE_BYTES, shm._INLINE_BYTES = before
        stream.FrameStream._wait_for_room = wait_for_room  # type: ignore[method-assign]


def _close(loop: VirtualLoop) -> None:
    """Ends every task, those of dead processes too, so that nothing is left to the garbage collector."""
    loop.ignores_owners = True
    loop.set_exception_handler(lambda loop, context: None)
    for _ in range(20):
        tasks = asyncio.all_tasks(loop)
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        with contextlib.suppress(Exception):
            loop.run_until_complete(_settle())
    with contextlib.suppress(Exception):
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
