"""The router alone, in one thread: decisions a second, how long the slow ones take, what it finds of the caches, and how fast
KV events are taken in. No workers, no network: the same code that the gateway runs."""

from __future__ import annotations

import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.api.events.v1 import events_pb2
from baton.load.report import Row
from baton.services.core.cost_model import WorkerCost
from baton.services.core.fetch import FetchPolicy
from baton.services.core.fleet import Fleet
from baton.services.core.links import LinkMatrix
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.quick_route import FleetRouter
from baton.services.core.router import Placement, Role, RoutedRequest, WorkerView

NUM_WORKERS = 1000
NUM_HOSTS = 125
NUM_INDEXED = 1_000_000
NUM_DECISIONS = 20_000
BLOCK_BYTES = 2 << 20
# Prompts that are computed at a time: six in ten prefill workers are busy.
NUM_UNDER_WAY = 300

MIN_PER_S = {27: 100_000.0, 890: 50_000.0}
MAX_P99_US = 50.0
MIN_EVENTS_PER_S = 1_000_000.0
MIN_INSERT_RATIO = 0.25
MIN_HIT_RATIO = 0.95
TRACE_VARIABLE = "BATON_MOONCAKE_TRACE"
_TRACE_BLOCK = 512


def bench_router(trace: Path | None = None) -> list[Row]:
    """``trace``: a Mooncake trace, one JSON object a line; else the one that ``BATON_MOONCAKE_TRACE`` names."""
    if trace is None and os.environ.get(TRACE_VARIABLE):
        trace = Path(os.environ[TRACE_VARIABLE])
    rows = []
    for num_blocks, limit in MIN_PER_S.items():
        rows += _decisions(num_blocks, limit)
    rows += _ingestion()
    rows += _hit_rate(trace)
    return rows


@dataclass(slots=True)
class _Cluster:
    fleet: Fleet
    index: PrefixIndex
    router: FleetRouter
    links: LinkMatrix
    chains: list[list[bytes]]


def _cluster(num_blocks: int) -> _Cluster:
    """Half of the workers prefill. A million blocks in chains of ``num_blocks``, each held by the two workers that a handoff
    leaves it on, one in eight by another pair too; a pair's chains have their first sixteenth in common."""
    draw = random.Random(num_blocks)
    fleet, index = Fleet(), PrefixIndex()
    chains = []
    for number in range(NUM_WORKERS):
        fleet.put(_worker(number, _role(number), draw))
    num_pairs = NUM_WORKERS // 2
    for pair in range(num_pairs):
        common = [draw.randbytes(16) for _ in range(num_blocks // 16)]
        for _ in range(NUM_INDEXED // num_pairs // num_blocks + 1):
            chain = common + [draw.randbytes(16) for _ in range(num_blocks - len(common))]
            chains.append(chain)
            for holder in {pair, draw.randrange(num_pairs)} if draw.random() < 1 / 8 else {pair}:
                for name in (f"w{2 * holder}", f"w{2 * holder + 1}"):
                    index.apply(name, name, index.sequence(name, name) + 1, chain, ())
    return _Cluster(fleet, index, FleetRouter(fleet, index), LinkMatrix(), chains)


def _role(number: int) -> Role:
    return Role.PREFILL if number % 2 == 0 else Role.DECODE


def _worker(number: int, role: Role, draw: random.Random) -> WorkerView:
    return WorkerView(
        worker_id=f"w{number}",
        incarnation=f"w{number}",
        role=role,
        address=f"10.0.0.{number}:1",
        compatibility="same",
        host_id=f"h{number % NUM_HOSTS}",
        queued_tokens=0,
        running=draw.randrange(64) if role is Role.DECODE else 0,
        cost=WorkerCost(prefill_s_per_token=100e-6),
    )


def _decisions(num_blocks: int, limit: float) -> list[Row]:
    """Each with what it adds to the load of the two workers."""
    cluster = _cluster(num_blocks)
    draw = random.Random(1)
    prompts = []
    for _ in range(NUM_DECISIONS):
        chain = draw.choice(cluster.chains)
        known = draw.choice((0, num_blocks // 16, num_blocks // 2, num_blocks))
        prompts.append(chain[:known] + [draw.randbytes(16) for _ in range(num_blocks - known)])
    laps: list[float] = []
    per_s = []
    for _ in range(5):
        took_ns = _time_decisions(cluster, prompts)
        laps += took_ns
        per_s.append(len(took_ns) / sum(took_ns) * 1e9)
    laps.sort()
    p99_us = laps[int(0.99 * len(laps))] / 1e3
    name = f"router, {NUM_WORKERS} workers, {num_blocks}-block prompts"
    return [
        Row(f"{name}: decisions", max(per_s), "1/s", tuple(per_s), "at least", limit),
        Row(
            f"{name}: beside", max(per_s), "1/s", tuple(per_s), "a loop that looks up every name", _look_ups(num_blocks)
        ),
        Row(f"{name}: p99 of a decision", p99_us, "us", (), "at most", MAX_P99_US),
    ]


def _look_ups(num_blocks: int) -> float:
    """Prompts a second whose names are only hashed and looked up among a million, one by one: what this language and this
    machine's memory allow whoever reads all of a prompt."""
    draw = random.Random(4)
    known = {draw.randbytes(16): 1 for _ in range(NUM_INDEXED)}.get
    per_s = []
    for _ in range(5):
        prompts = [[draw.randbytes(16) for _ in range(num_blocks)] for _ in range(50_000 // num_blocks)]
        begin = time.perf_counter()
        for prompt in prompts:
            for name in prompt:
                known(name)
        per_s.append(len(prompts) / (time.perf_counter() - begin))
    return max(per_s)


def _time_decisions(cluster: _Cluster, prompts: Sequence[list[bytes]]) -> list[int]:
    fleet, route, links, policy = cluster.fleet, cluster.router.route, cluster.links, FetchPolicy()
    under_way: deque[tuple[str, str, int]] = deque()
    seats = fleet.seats
    took = []
    for number, prompt in enumerate(prompts):
        num_tokens = 16 * len(prompt) + 5
        request_id = f"request-{number}"
        begin = time.perf_counter_ns()
        request = RoutedRequest(request_id, num_tokens, 16, BLOCK_BYTES, {}, fetch=policy)
        chosen = route(request, prompt, Placement.REMOTE, links, 0.0).chosen
        assert chosen.prefill is not None
        prefill, decode = chosen.prefill.worker_id, chosen.decode.worker_id
        fleet.set_load(prefill, seats[prefill].queued_tokens + num_tokens, 0)
        fleet.set_load(decode, 0, seats[decode].running + 1)
        took.append(time.perf_counter_ns() - begin)
        under_way.append((prefill, decode, num_tokens))
        if len(under_way) > NUM_UNDER_WAY:
            _end(fleet, *under_way.popleft())
    for prefill, decode, num_tokens in under_way:
        _end(fleet, prefill, decode, num_tokens)
    return took


def _end(fleet: Fleet, prefill: str, decode: str, num_tokens: int) -> None:
    seats = fleet.seats
    fleet.set_load(prefill, seats[prefill].queued_tokens - num_tokens, 0)
    fleet.set_load(decode, 0, seats[decode].running - 1)


def _ingestion() -> list[Row]:
    """Blocks a second, from the messages as they come, beside inserts of the same names into a dictionary."""
    draw = random.Random(2)
    names = [draw.randbytes(16) for _ in range(NUM_INDEXED)]
    size = NUM_INDEXED // NUM_WORKERS
    messages = [
        events_pb2.KVEvents(sequence=1, stored=names[start : start + size]).SerializeToString()
        for start in range(0, len(names), size)
    ]

    def ingest() -> None:
        index = PrefixIndex()
        for number, message in enumerate(messages):
            events = events_pb2.KVEvents.FromString(message)
            index.apply(f"w{number}", "i", events.sequence, events.stored, events.removed)

    def insert() -> None:
        known: dict[bytes, int] = {}
        for name in names:
            known[name] = 1

    index_per_s, insert_per_s = [], []
    for _ in range(5):
        index_per_s.append(NUM_INDEXED / _seconds(ingest))
        insert_per_s.append(NUM_INDEXED / _seconds(insert))
    name = "router, KV events taken in"
    return [
        Row(name, max(index_per_s), "blocks/s", tuple(index_per_s), "at least", MIN_EVENTS_PER_S),
        Row(
            f"{name}: at least {MIN_INSERT_RATIO} of",
            max(index_per_s),
            "blocks/s",
            tuple(index_per_s),
            "inserts into a dictionary",
            max(insert_per_s),
        ),
    ]


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _hit_rate(trace: Path | None) -> list[Row]:
    """Blocks of the prompts that were cached where they were prefilled, or fetched there, beside a router that finds every
    block that was ever computed. Caches without a limit, so that the router alone makes the difference; prefill workers are
    busy six tenths of the time."""
    name = f"router, cached blocks found, {NUM_WORKERS} workers, Mooncake conversations"
    if trace is None or not trace.exists():
        return [Row(name, None, "", skipped=f"no trace: set {TRACE_VARIABLE} to mooncake_conversation_trace.jsonl")]
    found, there, total = _replay(list(_read_trace(trace)))
    return [
        Row(f"{name} (at least {MIN_HIT_RATIO} of)", found / total, "of all", (), "all that were there", there / total)
    ]


@dataclass(frozen=True, slots=True)
class _Prompt:
    at_s: float
    num_tokens: int
    names: list[bytes]


def _read_trace(path: Path) -> Iterator[_Prompt]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            names = [number.to_bytes(16, "little") for number in row["hash_ids"]]
            yield _Prompt(row["timestamp"] / 1e3, row["input_length"], names)


def _replay(prompts: Sequence[_Prompt]) -> tuple[int, int, int]:
    """Blocks found, blocks that somebody had, all full blocks."""
    draw = random.Random(3)
    fleet, index = Fleet(), PrefixIndex()
    cost = WorkerCost(prefill_s_per_token=100e-6)
    for number in range(NUM_WORKERS):
        view = _worker(number, _role(number), draw)
        fleet.put(
            WorkerView(view.worker_id, view.incarnation, view.role, view.address, "same", view.host_id, cost=cost)
        )
    router, links, policy = FleetRouter(fleet, index), LinkMatrix(), FetchPolicy()
    work_s = sum(prompt.num_tokens for prompt in prompts) * cost.prefill_s_per_token
    speed_up = 0.6 * (NUM_WORKERS / 2) / (work_s / prompts[-1].at_s)
    free_s = dict.fromkeys(fleet.seats, 0.0)
    done: deque[tuple[float, str, str, list[bytes]]] = deque()
    known: set[bytes] = set()
    found = there = total = 0
    for number, prompt in enumerate(prompts):
        now = prompt.at_s / speed_up
        full = prompt.names[: (prompt.num_tokens - 1) // _TRACE_BLOCK]
        while done and done[0][0] <= now:
            _, prefill, decode, names = done.popleft()
            known.update(names)
            for worker in (prefill, decode):
                index.apply(worker, worker, index.sequence(worker, worker) + 1, names, ())
        for worker, until_s in free_s.items():
            if until_s > now - 5.0:
                fleet.set_load(worker, round(max(0.0, until_s - now) / cost.prefill_s_per_token), 0)
        request = RoutedRequest(
            f"r{number}", prompt.num_tokens, _TRACE_BLOCK, _TRACE_BLOCK * (BLOCK_BYTES // 16), {}, fetch=policy
        )
        chosen = router.route(request, prompt.names, Placement.REMOTE, links, now).chosen
        assert chosen.prefill is not None
        prefill, decode = chosen.prefill.worker_id, chosen.decode.worker_id
        num_here = index.matches(full).get(prefill, 0)
        num_found = num_here if chosen.fetch is None else max(num_here, chosen.fetch.num_blocks)
        total += len(full)
        found += min(num_found, len(full))
        there += next((depth for depth, name in enumerate(full) if name not in known), len(full))
        begin_s = max(now, free_s[prefill])
        free_s[prefill] = begin_s + (prompt.num_tokens - num_found * _TRACE_BLOCK) * cost.prefill_s_per_token
        done.append((free_s[prefill], prefill, decode, full))
        if len(done) > 1 and done[-1][0] < done[-2][0]:
            done = deque(sorted(done, key=lambda item: item[0]))
    return found, there, total
