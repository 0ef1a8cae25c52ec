"""What a seed decides before anything runs: machines, load and faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from helpers.simulation.clients import Ask
from helpers.simulation.model import BLOCK_SIZE, EOS, MAX_MODEL_LEN, VOCABULARY

from baton.services.core.request import SamplingParams
from baton.services.core.router import Placement
from baton.services.core.tenants import Tenant
from baton.services.gateway.generation import SloTarget

# Faults that a pair with a spare survives without anybody noticing but by the time it takes.
SURVIVABLE = (
    "crash", "power", "pause", "block", "reset", "flip", "cut", "double", "bus_down", "bus_cut", "bus_loss", "slow",
    "raise", "drain", "slow_link", "block_data", "hang",
)  # fmt: skip
# Everything else. What kills the gateway ends its requests; the rest is for workers.
OTHERS = ("gateway",)


# Those that can fall on the moment of a message, and the messages.
MOMENTARY = ("crash", "power", "pause", "block", "reset", "drain", "hang", "raise")
MOMENTS = (
    "Handshake>", "Handshake<", "Reserve>", "Reserve<", "Commit>", "Commit<", "Abort>", "Abort<", "Heartbeat>", "Fetch>",
    "Open>", "Open<", "Open<", "Open<", "data", "data",
)  # fmt: skip


@dataclass
class WorkerSpec:
    """One worker machine."""

    role: str
    index: int
    num_blocks: int
    step_s: float
    token_s: float
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


@dataclass
class Fault:
    """One fault. ``target`` and ``other`` are machines; ``lasts_s`` None: for good.

    With ``on`` it happens with the ``nth`` message of that name instead of at a time, to whoever sends or receives it.
    """

    kind: str
    at_s: float  # after the load began
    target: str
    other: str = ""
    lasts_s: float | None = None
    count: int = 1
    on: str = ""
    nth: int = 1
    hits_source: bool = False
    later_s: float = 0.0


@dataclass
class Scenario:
    """A run, in full. The same seed draws the same one."""

    seed: int
    workers: list[WorkerSpec]
    asks: list[Ask]
    faults: list[Fault]
    placement: Placement
    socket_bytes: int
    bytes_per_s: float
    thread_s: float = 0.0  # longest time until a copying thread gets to something; 0: everything is done at once
    probes: list[Ask] = field(default_factory=list)  # after the faults
    has_spare: bool = False  # one fault, one spare of each kind: nobody may fail
    extra_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def draw_scenario(seed: int, *, num_faults: int | None = None, kinds: tuple[str, ...] | None = None) -> Scenario:
    """``num_faults`` and ``kinds`` narrow what is drawn, for whoever looks for something."""
    rng = random.Random(seed)
    has_spare = rng.random() < 0.4 if num_faults is None else num_faults <= 1
    num_prefill = 2 if has_spare else rng.choice([1, 1, 2, 2, 3])
    num_decode = 2 if has_spare else rng.choice([1, 1, 2, 2, 3])
    is_tiny = rng.random() < 0.35
    step_s = rng.choice([0.005, 0.02, 0.05])
    settings: dict[str, Any] = {
        "max_num_seqs": rng.choice([2, 4, 8]),
        "max_num_batched_tokens": rng.choice([8, 16, 48]),
        "prefix_caching": rng.random() < 0.85,
        "drain_timeout_s": rng.choice([1.0, 10.0, 30.0]),
        "transport": rng.choice(["tcp", "auto"]),  # bytes inline, or by reference
    }
    workers = [
        WorkerSpec(
            role,
            index,
            rng.randint(MAX_MODEL_LEN // BLOCK_SIZE, 24) if is_tiny else rng.randint(40, 120),
            step_s * rng.choice([1.0, 1.0, 1.5]),
            rng.choice([1e-5, 2e-4]),
            dict(settings),
        )
        for role, count in (("prefill", num_prefill), ("decode", num_decode))
        for index in range(count)
    ]
    if has_spare:
        count = 1
    elif num_faults is not None:
        count = num_faults
    else:
        count = rng.choice([0, 1, 1, 2, 2, 3, 4, 8])
    if num_faults == 0:
        count = 0
    asks = _draw_asks(rng, seed, timeout_s=240.0 if has_spare else rng.choice([8.0, 30.0, 60.0, 120.0]))
    _draw_promises(asks, seed)
    names = [worker.name for worker in workers]
    # Faults fall where something is going on: a little after requests came.
    busy_s = [ask.at_s + rng.expovariate(1.0 / (12 * step_s)) for ask in asks]
    if kinds is None:
        kinds = SURVIVABLE if has_spare else SURVIVABLE + OTHERS
    faults = [_draw_fault(rng, rng.choice(kinds), names, rng.choice(busy_s)) for _ in range(count)]
    return Scenario(
        seed,
        workers,
        asks,
        faults,
        rng.choice([Placement.REMOTE] * 5 + [Placement.AUTO] * 2 + [Placement.LOCAL]),
        socket_bytes=rng.choice([200, 1000, 1 << 16]),
        bytes_per_s=rng.choice([2e4, 1e6, 1e9]),
        thread_s=rng.choice([0.0, 0.001, 0.05]),
        probes=_draw_asks(rng, seed, timeout_s=60.0, name="probe")[:3],
        has_spare=has_spare,
    )


def _draw_asks(rng: random.Random, seed: int, *, timeout_s: float, name: str = "r") -> list[Ask]:
    num_asks = rng.randint(4, 18)
    span_s = rng.choice([0.02, 0.3, 1.0])
    shared = [rng.randrange(1, VOCABULARY) for _ in range(40)]
    asks = []
    for number in range(num_asks):
        prefix = shared[: rng.choice([0, 0, 4, 8, 16, 30])]
        prompt = prefix + [rng.randrange(1, VOCABULARY) for _ in range(rng.choice([1, 3, 8, 16]))]
        max_tokens = rng.choice([1, 2, 8, 20, 30])
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.getrandbits(64),
            eos_token_ids=frozenset({EOS}),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=frozenset({rng.randrange(VOCABULARY)}) if rng.random() < 0.2 else frozenset(),
            min_tokens=min(max_tokens, rng.choice([0, 0, 3])),
        )
        asks.append(
            Ask(
                f"s{seed}-{name}{number}",
                rng.uniform(0.0, span_s),
                prompt,
                sampling,
                rng.choice(["", "", "tenant-a", "tenant-b"]),
                timeout_s,
                leaves_after_s=rng.expovariate(4.0) if rng.random() < 0.15 and name == "r" else None,
                stops_after=rng.randint(1, 8) if rng.random() < 0.1 and name == "r" else None,
            )
        )
    return asks


def _draw_promises(asks: list[Ask], seed: int) -> None:
    """Classes, targets and tenants. Draws of their own: what else a seed decides does not depend on them."""
    rng = random.Random(f"promises of {seed}")
    classes = rng.choice([["standard"], ["interactive", "standard"], ["interactive", "standard", "batch"], ["batch"]])
    tenants = rng.choice([[""], ["a", "b"], ["a", "a", "a", "b", "c"]])
    for ask in asks:
        has_targets = rng.random() < 0.5
        ask.slo = SloTarget(
            rng.choice(classes),
            ttft_ms=rng.choice([20.0, 200.0, 2000.0]) if has_targets else None,
            tpot_ms=rng.choice([5.0, 50.0]) if has_targets else None,
        )
        tenant = rng.choice(tenants)
        ask.tenant = Tenant(tenant, tenant, weight=rng.choice([0.5, 1.0, 1.0, 4.0]))


def _draw_fault(rng: random.Random, kind: str, names: list[str], at_s: float) -> Fault:
    target = rng.choice(names)
    others = ["gateway", *(name for name in names if name.split("-")[0] != target.split("-")[0])]
    other = rng.choice(others)
    if kind in ("flip", "cut", "double", "block_data"):
        other = rng.choice(others[1:]) if len(others) > 1 else "gateway"
    lasts_s: float | None = rng.choice([0.05, 0.5, 3.0, 12.0, 40.0])
    if kind == "gateway":
        lasts_s = rng.choice([0.05, 0.5, 2.0])
    if kind in ("crash", "power", "drain") and rng.random() < 0.3:
        lasts_s = None
    fault = Fault(kind, at_s, target, other, lasts_s, count=rng.choice([1, 1, 2, 5]))
    if kind in MOMENTARY and rng.random() < 0.6:
        fault.on, fault.nth = rng.choice(MOMENTS), rng.choice([1, 1, 2, 3, 5, 8, 20])
        fault.hits_source = rng.random() < 0.5
        fault.later_s = rng.choice([0.0, 0.0, 1e-4, 2e-3])
    return fault
