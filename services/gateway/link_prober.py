"""Sees to it that pairs of workers are known to work before a request needs them: asks prefill workers to send canaries."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import structlog

from baton.api.common.v1 import common_pb2
from baton.api.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from baton.kvtransfer.errors import TransferCode
from baton.services.core.breaker import BreakerState
from baton.services.core.link_plan import pairs_to_probe
from baton.services.core.links import LinkMatrix, LinkState, PairKey, ProbeResult, Standing
from baton.services.core.router import Role, WorkerView
from baton.services.gateway.registry import KnownWorker, Registry
from baton.services.runtime.grpc import create_channel

log = structlog.get_logger(__name__)

# A pair that works is looked at again now and then; one that does not, soon, and then ever less often.
PROBE_AGAIN_S = 60.0
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 30.0
PROBE_TIMEOUT_S = 20.0
MAX_PROBES_AT_ONCE = 8
# Refusals that say nothing about the way: the worker is on its way out, or has been replaced.
_PASSING = frozenset({TransferCode.STALE, TransferCode.DRAINING})


@dataclass(slots=True)
class _Plan:
    """When a pair is probed next."""

    due_s: float
    retry_s: float = FIRST_RETRY_S


class LinkProber:
    """Keeps ``links`` up to date for the workers of ``registry``. Lives on the gateway's event loop."""

    def __init__(
        self,
        registry: Registry,
        links: LinkMatrix,
        *,
        clock: Callable[[], float],
        open_channel: Callable[[str], grpc.aio.Channel] = create_channel,
        on_probed: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._links = links
        self._clock = clock
        self._open_channel = open_channel
        self._on_probed = on_probed
        self._planned_for: tuple[int, int] | None = None  # the fleet's version, and how many are gone
        self._look_s = 0.0
        self._plans: dict[PairKey, _Plan] = {}
        self._ids: dict[str, str] = {}  # of the workers that probe and are probed, by incarnation
        self._due: deque[PairKey] = deque()
        self._probes: dict[PairKey, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Probes new pairs at once and old ones now and then. Runs until cancelled."""
        try:
            while True:
                self._look()
                try:
                    async with asyncio.timeout(max(0.01, self._look_s - self._clock())):
                        await self._registry.wait_changed()
                except TimeoutError:
                    pass
        finally:
            self._due.clear()
            probes = list(self._probes.values())
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)

    def _look(self) -> None:
        """Starts what is due. Between two looks a second apart, only when workers came or went: each of them reports once a
        second, and reports are no news."""
        now = self._clock()
        fleet = self._registry.fleet
        version = fleet.version, self._registry.num_forgotten
        is_new = version != self._planned_for
        if not is_new and now < self._look_s:
            return
        self._look_s = now + FIRST_RETRY_S
        if is_new:
            self._planned_for = version
            self._make_plans(fleet.views(), now)
        for pair in self._links.troubled():
            # Found out by a transfer, perhaps of a pair that is not among those that are probed.
            if pair not in self._plans and pair.prefill in self._ids and pair.decode in self._ids:
                self._plans[pair] = _Plan(now)
        self._due = deque(pair for pair, plan in self._plans.items() if self._is_due(pair, plan, now))
        self._start_due()

    def _make_plans(self, views: Sequence[WorkerView], now: float) -> None:
        """Pairs are chosen whether or not their blocks differ: the two then say how."""
        prefill = [view for view in views if view.role is Role.PREFILL]
        decode = [view for view in views if view.role is Role.DECODE]
        self._links.forget_all_but(known.link.incarnation for known in self._registry)
        self._ids = {view.incarnation: view.worker_id for view in (*prefill, *decode)}
        old = self._plans
        self._plans = {pair: old.get(pair) or _Plan(now) for pair in pairs_to_probe(prefill, decode)}

    def _is_due(self, pair: PairKey, plan: _Plan, now: float) -> bool:
        if pair in self._probes:
            return False
        return plan.due_s <= now or self._is_free_to_try(pair, now)

    def _is_free_to_try(self, pair: PairKey, now: float) -> bool:
        is_half_open = self._links.breaker_state(pair, now) == BreakerState.HALF_OPEN
        return is_half_open and self._links.standing(pair, now) is Standing.FINE

    def _start_due(self) -> None:
        now = self._clock()
        while self._due and len(self._probes) < MAX_PROBES_AT_ONCE:
            pair = self._due.popleft()
            plan = self._plans.get(pair)
            prefill, decode = (self._registry.get(self._ids.get(incarnation, "")) for incarnation in pair)
            if plan is None or prefill is None or decode is None or not self._is_due(pair, plan, now):
                continue
            if self._links.breaker_state(pair, now) == BreakerState.HALF_OPEN:
                self._links.on_start(pair, now)  # the one try that is let through
            probe = asyncio.create_task(self._probe(pair, plan, prefill, decode), name="probe-link")
            self._probes[pair] = probe
            probe.add_done_callback(lambda _, pair=pair: self._on_over(pair))  # type: ignore[misc]

    def _on_over(self, pair: PairKey) -> None:
        del self._probes[pair]
        self._start_due()

    async def _probe(self, pair: PairKey, plan: _Plan, prefill: KnownWorker, decode: KnownWorker) -> None:
        result = await self._ask(prefill, decode)
        now = self._clock()
        if result is not None:
            before = self._links.get(pair).state
            self._links.on_probe(pair, result, now)
            self._log(prefill, decode, before, self._links.get(pair).state, result)
            self._on_probed()
        if result is not None and result.error is None:
            plan.due_s, plan.retry_s = now + PROBE_AGAIN_S, FIRST_RETRY_S
        else:
            plan.due_s = now + plan.retry_s
            plan.retry_s = min(2 * plan.retry_s, LAST_RETRY_S)

    async def _ask(self, prefill: KnownWorker, decode: KnownWorker) -> ProbeResult | None:
        """What the prefill worker found. None: it could not be asked, which says nothing about the pair."""
        request = kvtransfer_pb2.ProbeRequest(
            sender=_identity(prefill), receiver=_identity(decode), receiver_address=decode.link.address
        )
        try:
            async with self._open_channel(prefill.link.address) as channel:
                stub = kvtransfer_pb2_grpc.KVTransferServiceStub(channel)
                answer = await stub.Probe(request, timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # a worker of a version before this call
                return ProbeResult()
            log.debug("a worker could not be asked to probe", worker_id=prefill.link.worker_id, cause=error.details())
            return None
        if not answer.HasField("refusal"):
            return ProbeResult(
                transport=answer.transport,
                is_verified=answer.verified,
                rtt_ms=answer.rtt_ms,
                gb_per_s=answer.gb_per_s,
                failed_transports=tuple(answer.failed),
            )
        if answer.refusal.code in _PASSING:
            return None
        return ProbeResult(error=f"{answer.refusal.code}: {answer.refusal.message}")

    def _log(
        self, prefill: KnownWorker, decode: KnownWorker, before: LinkState, state: LinkState, result: ProbeResult
    ) -> None:
        if before is state:
            return
        write = log.warning if result.error is not None else log.info
        write(
            "pair probed",
            prefill=prefill.link.worker_id,
            decode=decode.link.worker_id,
            state=state.value,
            transport=result.transport,
            rtt_ms=round(result.rtt_ms, 3),
            gb_per_s=round(result.gb_per_s, 3),
            failed_transports=result.failed_transports,
            error=result.error,
        )


def describe_links(registry: Registry, links: LinkMatrix, now: float) -> list[dict[str, object]]:
    """``GET /v1/workers``: every worker, and for prefill workers the ways from it."""
    described = registry.describe()
    # Blocks are fetched between other pairs too, which nobody probes.
    ids = {known.link.incarnation: known.link.worker_id for known in registry if known.link.role is not Role.PREFILL}
    for worker in described:
        if worker["role"] == Role.PREFILL.value:
            incarnation = str(worker["incarnation"])
            own = [PairKey(incarnation, decode) for decode in links.row(incarnation) if decode in ids]
            worker["links"] = [
                _describe(links, pair, ids[pair.decode], now) for pair in sorted(own, key=lambda pair: ids[pair.decode])
            ]
    return described


def _describe(links: LinkMatrix, pair: PairKey, decode_id: str, now: float) -> dict[str, object]:
    link = links.get(pair)
    return {
        "decode": decode_id,
        "state": link.state.value,
        "transport": link.transport or None,
        "rtt_ms": round(link.rtt_ms, 3),
        "gb_per_s": round(link.gb_per_s, 3),
        "probed_s_ago": None if link.probed_s is None else round(now - link.probed_s, 1),
        "breaker": links.breaker_state(pair, now),
        "transfers": link.num_transfers,
        "failures": link.num_failures,
        "reason": link.reason or None,
        "failed_transports": list(link.failed_transports),
    }


def _identity(known: KnownWorker) -> common_pb2.WorkerIdentity:
    return common_pb2.WorkerIdentity(worker_id=known.link.worker_id, incarnation=known.link.incarnation)
