"""The invariants that hold when everything is quiet: nothing held, nothing open, nothing left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from helpers.simulation.clock import State

from baton.services.core.scheduler.base import ScheduledRequest
from baton.services.core.scheduler.waiting import is_yielding

if TYPE_CHECKING:
    from helpers.simulation.gateway import SimGateway
    from helpers.simulation.worker import SimWorker
    from helpers.simulation.world import World

# Batch gives way for two minutes; whoever was in front of it then has at most as long again.
LONGEST_WAIT_S = 200.0


def check_quiet(world: World) -> list[str]:
    """I3, I6 and the counting half of I1 and I8. Empty: all is well."""
    problems: list[str] = []
    for worker in world.workers:
        if worker.process is not None and worker.process.state is State.RUNNING and worker.is_ready:
            problems += [f"I3 {worker.name}: {problem}" for problem in _check_worker(worker)]
    if world.gateway.is_alive:
        problems += [f"I3 gateway: {problem}" for problem in _check_gateway(world.gateway)]
    return problems


def check_turn(scheduler: Any, batch: list[ScheduledRequest], now: float) -> list[str]:
    """I9, of one step: batch computes no prompt while somebody in a hurry could, and nobody waits for ever."""
    problems = []
    computed = {item.request for item in batch}
    gives_way = [s.request.request_id for s in scheduler._running if is_yielding(s) and s.request.is_prefilling]
    passed_over = [
        sequence.request.request_id
        for sequence in scheduler._running
        if not is_yielding(sequence) and sequence.request.is_prefilling and sequence.request not in computed
    ]
    taken = [name for name in gives_way if any(request.request_id == name for request in computed)]
    if taken and passed_over:
        problems.append(f"I9 {taken} of batch had tokens of a step, and {passed_over} none")
    queue = scheduler._queue if hasattr(scheduler, "_queue") else scheduler._waiting
    for sequence in queue.values():
        if now - sequence.request.arrival_s > LONGEST_WAIT_S:
            problems.append(f"I9 {sequence.request.request_id} has waited {now - sequence.request.arrival_s:.0f} s")
    return problems


def _check_worker(worker: SimWorker) -> list[str]:
    problems: list[str] = []
    host = worker.host
    assert host is not None
    assert host.worker is not None
    pool, active = host._pool, host.worker
    counts = pool.counts()
    try:
        pool.check_integrity()
    except RuntimeError as error:
        problems.append(str(error))
    if counts.error:
        problems.append(f"the ledger is wrong by {counts.error}")
    for state in ("request", "transfer", "quarantine"):
        if number := getattr(counts, state):
            held = [entry for entry in pool.ledger() if entry.state.value == state][:3]
            problems.append(f"{number} blocks are in state {state}: {held}")
    stats = active.steps._scheduler.stats()
    if stats.queued or stats.running or stats.awaiting_kv or stats.handing_over:
        problems.append(f"the scheduler has work: {stats}")
    if active.num_active:
        problems.append(f"requests are active: {sorted(active._active)}")
    if active._tasks:
        problems.append(f"tasks are left: {sorted(task.get_name() for task in active._tasks)}")
    transfers = host._agent.stats()
    if transfers.num_sending or transfers.num_receiving or transfers.num_quarantined:
        problems.append(
            f"handoffs are left: {transfers.num_sending} sending, {transfers.num_receiving} receiving, "
            f"{transfers.num_quarantined} slots in quarantine"
        )
    problems += _check_sizes(worker)
    return problems


def _check_sizes(worker: SimWorker) -> list[str]:
    """I6: what remembers something remembers a bounded number of things, and what waits does not wait for nothing."""
    host = worker.host
    assert host is not None
    assert host.worker is not None
    agent, problems = host._agent, []
    sending, receiving = agent._sending, agent._receiving
    expectations = receiving._expectations
    sizes = {
        "expected handoffs of the worker": (len(getattr(host.worker, "_expected", ())), 0),
        "destinations of the worker": (len(getattr(host.worker, "_destinations", ())), 0),
        "announced handoffs": (len(expectations._expected), 0),
        "waiting reservations": (expectations._num_waiting, 0),
        "handoffs being sent": (len(sending._handoffs), 0),
        "tasks of the sending side": (len(sending._tasks), 0),
        "sessions": (len(host.worker._sessions), 1),
    }
    for what, (size, bound) in sizes.items():
        if size > bound:
            problems.append(f"{size} {what}, at most {bound}")
    return problems


def _check_gateway(gateway: SimGateway) -> list[str]:
    problems = []
    if gateway.dispatcher.num_running:
        problems.append(f"{gateway.dispatcher.num_running} requests are running")
    for known in gateway.registry:
        if known.link.num_inflight:
            problems.append(f"{known.link.num_inflight} requests are in flight to {known.link.worker_id}")
    return problems
