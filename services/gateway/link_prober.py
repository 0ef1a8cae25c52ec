"""Sees to it that pairs of workers are known to work before a request needs them: asks prefill workers to send canaries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import structlog

from baton.api.common.v1 import common_pb2
from baton.api.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from baton.kvtransfer.errors import TransferCode
from baton.services.core.breaker import BreakerState
from baton.services.core.links import LinkMatrix, LinkState, PairKey, ProbeResult, Standing
from baton.services.core.router import Role
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
        self._plans: dict[PairKey, _Plan] = {}
        self._probes: dict[PairKey, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Probes new pairs at once and old ones now and then. Runs until cancelled."""
        try:
            while True:
                wake_s = self._start_due()
                try:
                    async with asyncio.timeout(max(0.01, wake_s - self._clock())):
                        await self._registry.wait_changed()
                except TimeoutError:
                    pass
        finally:
            probes = list(self._probes.values())
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)

    def _start_due(self) -> float:
        """Starts what is due and returns when to look again."""
        now = self._clock()
        pairs = self._pairs()
        self._links.forget_all_but(known.link.incarnation for known in self._registry)
        for pair in [pair for pair in self._plans if pair not in pairs]:
            del self._plans[pair]
        for pair, (prefill, decode) in pairs.items():
            plan = self._plans.setdefault(pair, _Plan(now))
            is_half_open = self._links.breaker_state(pair, now) == BreakerState.HALF_OPEN
            is_due = plan.due_s <= now or (is_half_open and self._links.standing(pair, now) is Standing.FINE)
            if is_due and pair not in self._probes and len(self._probes) < MAX_PROBES_AT_ONCE:
                if is_half_open:
                    self._links.on_start(pair, now)  # the one try that is let through
                probe = asyncio.create_task(self._probe(pair, plan, prefill, decode), name="probe-link")
                self._probes[pair] = probe
                probe.add_done_callback(lambda _, pair=pair: self._probes.pop(pair, None))  # type: ignore[misc]
        return now + FIRST_RETRY_S

    def _pairs(self) -> dict[PairKey, tuple[KnownWorker, KnownWorker]]:
        """Every prefill with every decode worker, also where their blocks differ: the two then say how."""
        usable = [known for known in self._registry if known.is_usable]
        return {
            PairKey(prefill.link.incarnation, decode.link.incarnation): (prefill, decode)
            for prefill in usable
            for decode in usable
            if (prefill.link.role, decode.link.role) == (Role.PREFILL, Role.DECODE)
        }

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
            own = [pair for pair in links.pairs() if pair.prefill == worker["incarnation"] and pair.decode in ids]
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
