"""Which workers run a request: filters, then a price for every candidate, then the cheapest.

By default a prompt goes through the prefill pool whenever a usable pair exists, and the price picks the pair; without one
the decode worker prefills itself. ``Placement.AUTO`` lets the price decide that as well. The best way that was not chosen
is kept in the decision, so that every receipt tells what it was.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from baton.kvtransfer.versions import WIRE_VERSIONS, VersionRange, common_version
from baton.services.core.cost_model import OTHER_HOST, SAME_HOST, LinkCost, WorkerCost, visible_transfer_s
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.fetch import FetchPlan, FetchPolicy, plan_fetch
from baton.services.core.links import LinkMatrix, LinkView, PairKey, Standing

_STEPS_TO_A_SEAT = 100.0  # until a sequence ends and leaves its place, roughly
# A short answer's length: how many steps of a fuller batch are set against a quicker way to the first token. At a full batch a
# step is taken to last twice as long as that of an empty one.
_STEPS_COMPARED = 32


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class Mode(StrEnum):
    """How a request is run."""

    REMOTE = "remote"  # prefill worker, then decode worker
    LOCAL = "local"  # the decode worker prefills itself
    COLOCATED = "colocated"  # the worker's role is to do both


class Placement(StrEnum):
    """Who prefills, where both could."""

    REMOTE = "remote"  # the prefill pool
    LOCAL = "local"  # the decode worker
    AUTO = "auto"  # whichever is cheaper


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it: its last report, with the gateway's own work in flight already counted in."""

    worker_id: str
    incarnation: str
    role: Role
    address: str
    compatibility: str  # equal strings: the same blocks
    host_id: str = ""
    queued_tokens: int = 0  # prompt tokens waiting or being computed
    running: int = 0
    max_num_seqs: int = 256
    available_blocks: int = 1 << 30  # free or evictable
    max_num_batched_tokens: int = 2048
    cost: WorkerCost = field(default_factory=WorkerCost)
    wire_versions: VersionRange = WIRE_VERSIONS  # of the transfer protocol

    def exchanges_blocks_with(self, other: WorkerView) -> bool:
        """They have the same blocks, and a version of the wire in common: a newer release and the one before it do."""
        is_spoken = common_version(self.wire_versions, other.wire_versions) is not None
        return is_spoken and self.compatibility == other.compatibility


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What the router needs to know about a request. ``cached_blocks``: worker id -> leading blocks it holds."""

    request_id: str
    num_tokens: int
    block_size: int
    block_bytes: int
    cached_blocks: Mapping[str, int]
    excluded: Collection[str] = ()  # incarnations that already failed this request
    excluded_pairs: Collection[tuple[str, str]] = ()  # prefill and decode incarnations that failed it together
    preferred: Collection[str] = ()  # incarnations that hold blocks of it: before the price counts
    fetch: FetchPolicy | None = None  # None: blocks that others hold are not fetched

    def num_uncached_tokens(self, worker_id: str, fetch: FetchPlan | None = None) -> int:
        num_blocks = self.cached_blocks.get(worker_id, 0) if fetch is None else fetch.num_blocks
        return max(1, self.num_tokens - num_blocks * self.block_size)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the request and what it costs, in seconds."""

    mode: Mode
    decode: WorkerView
    prefill: WorkerView | None
    queue_s: float
    prefill_s: float
    transfer_s: float
    decode_wait_s: float
    interference_s: float = 0.0  # time that it costs after the first token: itself, and the streams beside it
    fetch: FetchPlan | None = None  # what the worker that prefills gets from a third one first

    @property
    def ttft_s(self) -> float:
        """Predicted time to first token."""
        fetch_s = 0.0 if self.fetch is None else self.fetch.fetch_s
        return self.queue_s + fetch_s + self.prefill_s + self.transfer_s + self.decode_wait_s

    @property
    def price_s(self) -> float:
        return self.ttft_s + self.interference_s

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """The choice, the best way not chosen, and a sentence on why."""

    chosen: Candidate
    runner_up: Candidate | None
    reason: str


def route(
    request: RoutedRequest,
    workers: Sequence[WorkerView],
    placement: Placement = Placement.REMOTE,
    links: LinkView | None = None,
    now: float = 0.0,
) -> RoutingDecision:
    """Prices every candidate and picks. Raises BatonError(NO_WORKERS), which is retryable, when none is usable.

    ``links`` are what is known of pairs at ``now``: one whose canary failed is no candidate; one with an open breaker is only
    taken when there is no other pair, and then the one that failed least lately.
    """
    links = links or LinkMatrix()
    usable = [worker for worker in workers if worker.incarnation not in request.excluded]
    decoders = [worker for worker in usable if worker.role is not Role.PREFILL]
    prefillers = [worker for worker in usable if worker.role is Role.PREFILL]
    if not decoders:
        raise BatonError(ErrorCode.NO_WORKERS, _explain_none(workers, request), retryable=True, retry_after_s=1.0)
    local = [_price_local(request, decoder, usable, links, now) for decoder in decoders]
    remote = [
        _price_remote(request, prefiller, decoder, usable, links, now)
        for decoder in decoders
        if decoder.role is Role.DECODE
        for prefiller in prefillers
        if prefiller.exchanges_blocks_with(decoder)
        and (prefiller.incarnation, decoder.incarnation) not in request.excluded_pairs
        and links.standing(PairKey(prefiller.incarnation, decoder.incarnation), now) is not Standing.FAILED
    ]
    first = {Placement.REMOTE: remote, Placement.LOCAL: local, Placement.AUTO: []}[placement]
    ranked = sorted(first, key=lambda c: _rank(request, c, links, now))
    ranked += sorted((c for c in remote + local if c not in first), key=lambda c: _rank(request, c, links, now))
    chosen = ranked[0]
    return RoutingDecision(
        chosen, ranked[1] if len(ranked) > 1 else None, _explain(chosen, placement, len(remote), len(local))
    )


def _rank(request: RoutedRequest, candidate: Candidate, links: LinkView, now: float) -> tuple[int, bool, float, int]:
    """Recent failures of a link whose breaker is open, preference, price, then a spread that depends on the request: equal
    workers share equal work without randomness."""
    num_failures = 0
    if candidate.prefill is not None:
        pair = PairKey(candidate.prefill.incarnation, candidate.decode.incarnation)
        if links.standing(pair, now) is Standing.OPEN:
            num_failures = 1 + links.num_failures(pair, now)
    key = "/".join((request.request_id, *(worker.worker_id for worker in candidate.workers)))
    is_strange = not any(worker.incarnation in request.preferred for worker in candidate.workers)
    return num_failures, is_strange, round(candidate.price_s, 6), zlib.crc32(key.encode())


def _plan_fetch(
    request: RoutedRequest, needer: WorkerView, workers: Sequence[WorkerView], links: LinkView, now: float
) -> FetchPlan | None:
    """What the worker that prefills should get from another first."""
    if request.fetch is None or not request.cached_blocks:
        return None
    costs = {
        worker.worker_id: _link(worker, needer, links)
        for worker in workers
        if worker.exchanges_blocks_with(needer)
        and links.may_fetch(PairKey(worker.incarnation, needer.incarnation), now)
    }
    return plan_fetch(
        request.fetch,
        needer.worker_id,
        costs,
        request.cached_blocks,
        num_tokens=request.num_tokens,
        block_size=request.block_size,
        block_bytes=request.block_bytes,
        prefill_s_per_token=needer.cost.prefill_s_per_token,
    )


def _price_local(
    request: RoutedRequest, decoder: WorkerView, workers: Sequence[WorkerView], links: LinkView, now: float
) -> Candidate:
    mode = Mode.COLOCATED if decoder.role is Role.COLOCATED else Mode.LOCAL
    fetch = _plan_fetch(request, decoder, workers, links, now)
    prefill_s = decoder.cost.prefill_s(request.num_uncached_tokens(decoder.worker_id, fetch))
    return Candidate(
        mode,
        decoder,
        None,
        queue_s=decoder.queued_tokens * decoder.cost.prefill_s_per_token,
        prefill_s=prefill_s,
        transfer_s=0.0,
        decode_wait_s=_seat_wait_s(request, decoder),
        interference_s=prefill_s * decoder.running + _crowding_s(decoder),
        fetch=fetch,
    )


def _price_remote(
    request: RoutedRequest,
    prefiller: WorkerView,
    decoder: WorkerView,
    workers: Sequence[WorkerView],
    links: LinkView,
    now: float,
) -> Candidate:
    fetch = _plan_fetch(request, prefiller, workers, links, now)
    num_blocks = -(-request.num_tokens // request.block_size)
    num_sent = max(0, num_blocks - request.cached_blocks.get(decoder.worker_id, 0))
    num_last_chunk = -(-min(request.num_tokens, prefiller.max_num_batched_tokens) // request.block_size)
    return Candidate(
        Mode.REMOTE,
        decoder,
        prefiller,
        queue_s=prefiller.queued_tokens * prefiller.cost.prefill_s_per_token,
        prefill_s=prefiller.cost.prefill_s(request.num_uncached_tokens(prefiller.worker_id, fetch)),
        transfer_s=visible_transfer_s(
            _link(prefiller, decoder, links), num_sent * request.block_bytes, num_last_chunk * request.block_bytes
        ),
        decode_wait_s=_seat_wait_s(request, decoder),
        interference_s=_crowding_s(decoder),
        fetch=fetch,
    )


def _link(prefiller: WorkerView, decoder: WorkerView, links: LinkView) -> LinkCost:
    measured = links.cost(PairKey(prefiller.incarnation, decoder.incarnation))
    if measured is not None:
        return measured
    return SAME_HOST if prefiller.host_id and prefiller.host_id == decoder.host_id else OTHER_HOST


def _seat_wait_s(request: RoutedRequest, decoder: WorkerView) -> float:
    """Wait for a place in the batch and for blocks."""
    num_blocks = -(-request.num_tokens // request.block_size)
    lacking = max(0, num_blocks - decoder.available_blocks) / max(1, num_blocks)
    too_many = max(0, decoder.running + 1 - decoder.max_num_seqs)
    return decoder.cost.decode_step_s * _STEPS_TO_A_SEAT * (too_many + lacking)


def _crowding_s(decoder: WorkerView) -> float:
    """A fuller batch steps slower, for every token that is to come: without this, one decode worker whose link is quicker by
    a hair gets everything."""
    return decoder.cost.decode_step_s * _STEPS_COMPARED * decoder.running / decoder.max_num_seqs


def _explain(chosen: Candidate, placement: Placement, num_remote: int, num_local: int) -> str:
    if chosen.mode is Mode.COLOCATED:
        return f"cheapest of {num_local} colocated workers"
    if chosen.mode is Mode.REMOTE:
        return f"cheapest of {num_remote} prefill/decode pairs"
    if not num_remote:
        return f"no usable prefill worker; cheapest of {num_local} decode workers prefills itself"
    if placement is Placement.LOCAL:
        return f"placement is local; cheapest of {num_local} decode workers"
    return f"cheaper than any of {num_remote} prefill/decode pairs"


def _explain_none(workers: Sequence[WorkerView], request: RoutedRequest) -> str:
    if not workers:
        return "no worker is ready; retry in a moment"
    num_decoders = sum(1 for worker in workers if worker.role is not Role.PREFILL)
    num_excluded = sum(1 for worker in workers if worker.incarnation in request.excluded)
    return (
        f"no usable decode worker: {len(workers)} workers known, {num_decoders} of them decode, "
        f"{num_excluded} already failed this request; retry in a moment"
    )
