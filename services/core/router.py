"""Which workers run a request: filters, then a price for every candidate, then the cheapest.

By default a prompt goes through the prefill pool whenever a usable pair exists, and the price picks the pair; without one
the decode worker prefills itself. ``Placement.AUTO`` lets the price decide that as well, and whether a prefill worker answers a
short request whole. The best way that was not chosen
is kept in the decision, so that every receipt tells what it was.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from baton.services.core.candidates import Answer as Answer
from baton.services.core.candidates import Candidate as Candidate
from baton.services.core.candidates import Mode as Mode
from baton.services.core.candidates import Placement as Placement
from baton.services.core.candidates import Role as Role
from baton.services.core.candidates import RoutedRequest as RoutedRequest
from baton.services.core.candidates import RoutingDecision as RoutingDecision
from baton.services.core.candidates import WorkerView as WorkerView
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.links import LinkMatrix, LinkView, PairKey, Standing
from baton.services.core.pricing import may_answer, price_local, price_remote, price_whole


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
    local = [price_local(request, decoder, usable, links, now) for decoder in decoders]
    remote = [
        price_remote(request, prefiller, decoder, usable, links, now)
        for decoder in decoders
        if decoder.role is Role.DECODE
        for prefiller in prefillers
        if prefiller.exchanges_blocks_with(decoder)
        and (prefiller.incarnation, decoder.incarnation) not in request.excluded_pairs
        and links.standing(PairKey(prefiller.incarnation, decoder.incarnation), now) is not Standing.FAILED
    ]
    whole = [
        price_whole(request, prefiller, usable, links, now)
        for prefiller in prefillers
        if placement is Placement.AUTO and may_answer(request, prefiller, prefiller.running)
    ]
    groups = {
        Placement.REMOTE: (remote, local),
        Placement.LOCAL: (local, remote),
        Placement.AUTO: (remote + local + whole,),
    }[placement]
    ranked = [c for group in groups for c in sorted(group, key=lambda c: _rank(request, c, links, now))]
    chosen = ranked[0]
    return RoutingDecision(
        chosen,
        ranked[1] if len(ranked) > 1 else None,
        explain(chosen, placement, len(remote), len(local)),
        other_way=next((candidate for candidate in ranked if is_remote(candidate) is not is_remote(chosen)), None),
    )


def is_remote(candidate: Candidate) -> bool:
    return candidate.prefill is not None


def _rank(
    request: RoutedRequest, candidate: Candidate, links: LinkView, now: float
) -> tuple[int, bool, int, float, int]:
    """Recent failures of a link whose breaker is open, preference, targets that are missed, price, then a spread that depends
    on the request: equal workers share equal work without randomness."""
    num_failures = 0
    if candidate.prefill is not None:
        pair = PairKey(candidate.prefill.incarnation, candidate.decode.incarnation)
        if links.standing(pair, now) is Standing.OPEN:
            num_failures = 1 + links.num_failures(pair, now)
    key = "/".join((request.request_id, *(worker.worker_id for worker in candidate.workers)))
    is_strange = not any(worker.incarnation in request.preferred for worker in candidate.workers)
    return num_failures, is_strange, candidate.num_misses, round(candidate.price_s, 6), zlib.crc32(key.encode())


def explain(chosen: Candidate, placement: Placement, num_remote: int, num_local: int) -> str:
    if chosen.decode.role is Role.PREFILL:
        others = f"{num_remote} prefill/decode pairs and {num_local} decode workers"
        return f"a prefill worker answers it whole, cheaper than any of {others}"
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
