"""What each way to run a request costs: the terms that the router compares."""

from __future__ import annotations

from collections.abc import Sequence

from baton.services.core.candidates import Candidate, Mode, Role, RoutedRequest, WorkerView
from baton.services.core.cost_model import OTHER_HOST, SAME_HOST, LinkCost, visible_transfer_s
from baton.services.core.fetch import FetchPlan, plan_fetch
from baton.services.core.links import LinkView, PairKey
from baton.services.core.scheduler.pace import STEP_SHARE

_STEPS_TO_A_SEAT = 100.0  # until a sequence ends and leaves its place, roughly
# A short answer's length: how many steps of a fuller batch are set against a quicker way to the first token. At a full batch a
# step is taken to last twice as long as that of an empty one.
_STEPS_COMPARED = 32
# The least that a decode worker computes of a prompt in a step: a block, whatever its streams were promised.
_LEAST_TOKENS = 16
_SLACK_WEIGHT = 0.05  # of a second that a stream with time to spare waits
# Of a prefill worker's seats and free blocks, what it gives for answers at most: it is there for prompts.
_WHOLE_SHARE = 0.5


def price_local(
    request: RoutedRequest, decoder: WorkerView, workers: Sequence[WorkerView], links: LinkView, now: float
) -> Candidate:
    """The decode worker computes the prompt itself."""
    mode = Mode.COLOCATED if decoder.role is Role.COLOCATED else Mode.LOCAL
    fetch = fetch_plan(request, decoder, workers, links, now)
    own_s = decoder.cost.prefill_s(request.num_uncached_tokens(decoder.worker_id, fetch))
    slowness, num_disturbed = beside(request, decoder, decoder.running)
    prefill_s = slowness * own_s
    queue_s = slowness * backlog_s(decoder, decoder.queued_tokens)
    stall_s = stalls_s(decoder, decoder.running, own_s)
    candidate = Candidate(
        mode,
        decoder,
        None,
        queue_s=queue_s,
        prefill_s=prefill_s,
        transfer_s=0.0,
        decode_wait_s=_seat_wait_s(request, decoder),
        interference_s=stall_s + crowding_s(decoder, decoder.running),
        fetch=fetch,
        slowness=slowness,
    )
    num_own = num_missed(request, candidate.ttft_s, decoder, decoder.running)
    return candidate._replace(num_misses=num_disturbed + num_own, curiosity_s=decoder.cost.curiosity * prefill_s)


def price_remote(
    request: RoutedRequest,
    prefiller: WorkerView,
    decoder: WorkerView,
    workers: Sequence[WorkerView],
    links: LinkView,
    now: float,
) -> Candidate:
    """The prefill worker computes the prompt and hands it over."""
    fetch = fetch_plan(request, prefiller, workers, links, now)
    own_s = prefiller.cost.prefill_s(request.num_uncached_tokens(prefiller.worker_id, fetch))
    slowness, num_disturbed = beside_answers(request, prefiller, prefiller.running)
    num_blocks = -(-request.num_tokens // request.block_size)
    num_sent = max(0, num_blocks - request.cached_blocks.get(decoder.worker_id, 0))
    num_last_chunk = -(-min(request.num_tokens, prefiller.max_num_batched_tokens) // request.block_size)
    candidate = Candidate(
        Mode.REMOTE,
        decoder,
        prefiller,
        queue_s=slowness * backlog_s(prefiller, prefiller.queued_tokens),
        prefill_s=slowness * own_s,
        transfer_s=visible_transfer_s(
            _link(prefiller, decoder, links), num_sent * request.block_bytes, num_last_chunk * request.block_bytes
        ),
        decode_wait_s=_seat_wait_s(request, decoder),
        # Prompts that the decode worker computes itself stretch its steps.
        interference_s=crowding_s(decoder, decoder.running) + backlog_s(decoder, decoder.queued_tokens),
        fetch=fetch,
        slowness=slowness,
    )
    gap_s = handoff_gap_s(decoder, decoder.running, candidate.transfer_s)
    compared_s = handoff_s(request, prefiller, decoder, own_s, gap_s)
    return candidate._replace(
        interference_s=candidate.interference_s + compared_s,
        num_misses=num_disturbed + num_missed(request, candidate.ttft_s, decoder, decoder.running, gap_s),
        curiosity_s=prefiller.cost.curiosity * candidate.prefill_s,
    )


def price_whole(
    request: RoutedRequest, prefiller: WorkerView, workers: Sequence[WorkerView], links: LinkView, now: float
) -> Candidate:
    """The prefill worker computes the prompt and gives the answer, so that nothing is handed over."""
    fetch = fetch_plan(request, prefiller, workers, links, now)
    own_s = prefiller.cost.prefill_s(request.num_uncached_tokens(prefiller.worker_id, fetch))
    return whole_answer(request, prefiller, own_s, fetch)


def whole_answer(request: RoutedRequest, prefiller: WorkerView, own_s: float, fetch: FetchPlan | None) -> Candidate:
    """The same. ``own_s``: what computing the prompt takes alone."""
    running = prefiller.running
    slowness, num_disturbed = beside(request, prefiller, running)
    prefill_s = slowness * own_s
    candidate = Candidate(
        Mode.COLOCATED,
        prefiller,
        None,
        queue_s=slowness * backlog_s(prefiller, prefiller.queued_tokens),
        prefill_s=prefill_s,
        transfer_s=0.0,
        decode_wait_s=0.0,
        interference_s=stalls_s(prefiller, running, own_s) + _occupied_s(request, prefiller, running),
        fetch=fetch,
        curiosity_s=prefiller.cost.curiosity * prefill_s,
        slowness=slowness,
    )
    return candidate._replace(num_misses=num_disturbed + num_missed(request, candidate.ttft_s, prefiller, running))


def may_answer(request: RoutedRequest, prefiller: WorkerView, running: int) -> bool:
    """A prefill worker can give the longest answer that the request may have, and keeps room and time for prompts."""
    if request.answer is None or not prefiller.answers_whole:
        return False
    # The answer that is expected takes no longer than the prompt would without a cache.
    cost = prefiller.cost
    if (request.answer.num_tokens - 1) * cost.step_s(1) > cost.prefill_s(request.num_tokens):
        return False
    num_blocks = -(-(request.num_tokens + request.answer.max_tokens) // request.block_size)
    has_room = num_blocks <= _WHOLE_SHARE * prefiller.available_blocks
    return has_room and running < max(1.0, _WHOLE_SHARE * prefiller.max_num_seqs)


def fetch_plan(
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


def beside(request: RoutedRequest, worker: WorkerView, running: int) -> tuple[float, int]:
    """``beside_streams`` for a request. Nobody hands over to a prefill worker; nor to a decode worker where there have been no
    handoffs lately, which is looked at where ways to answer are compared."""
    tpot_target_s = request.tpot_target_s
    gets_handoffs = worker.role is Role.DECODE and (request.answer is None or worker.gets_handoffs)
    return beside_streams(worker, running, tpot_target_s if running or gets_handoffs else None)


def beside_answers(request: RoutedRequest, prefiller: WorkerView, running: int) -> tuple[float, int]:
    """The same for a prompt that is handed over, beside the answers that its prefill worker gives itself."""
    return beside(request, prefiller, running) if request.answer is not None and running else (1.0, 0)


def beside_streams(decoder: WorkerView, running: int, tpot_target_s: float | None) -> tuple[float, int]:
    """How many times as long a prompt takes beside the streams of a worker, and how many of them miss their targets for it
    all the same.

    The worker makes no step longer than its strictest stream allows (``scheduler.pace``): what the streams leave of a step is
    for prompts. A block of each step is computed even where nothing is left. A decode worker may be handed another stream at
    any moment; that is taken to be as strict as the request itself, ``tpot_target_s``. So are answers of a prefill worker that
    have begun since its report.
    """
    tightest_s = decoder.tightest_tpot_s if running else None
    if decoder.role is not Role.COLOCATED and tpot_target_s is not None:
        tightest_s = tpot_target_s if tightest_s is None else min(tightest_s, tpot_target_s)
    if tightest_s is None:
        return 1.0, 0
    step_s, least_s = decoder.cost.decode_step_s, _LEAST_TOKENS * decoder.cost.prefill_s_per_token
    longest_s = STEP_SHARE * tightest_s
    room_s = max(longest_s - step_s, least_s)
    if step_s + least_s <= longest_s:
        return 1.0 + step_s / room_s, 0
    # Where they miss it anyway there is little to spoil.
    return 1.0 + step_s / room_s, max(1, running) if step_s <= tightest_s else 1


def stalls_s(decoder: WorkerView, running: int, prefill_s: float) -> float:
    """Time that a prompt takes from all streams that run there together. Where they have targets, which the worker keeps, it
    hardly counts: it is worth more to the request that has no token yet."""
    return prefill_s * running if decoder.tightest_tpot_s is None else _SLACK_WEIGHT * prefill_s * running


def num_missed(
    request: RoutedRequest, ttft_s: float, decoder: WorkerView, running: int, gap_s: float | None = None
) -> int:
    """How many of the request's own targets are predicted to be missed. ``gap_s``: between its first two tokens, where it is
    handed over between them; of a short answer that is much of what its tokens take."""
    ttft_target_s, tpot_target_s, answer = request.ttft_target_s, request.tpot_target_s, request.answer
    is_late = ttft_target_s is not None and ttft_s > ttft_target_s
    if tpot_target_s is None or (answer is not None and answer.num_tokens < 2):
        return int(is_late)
    tpot_s = decoder.cost.step_s(running + 1)
    if answer is not None and gap_s is not None:
        tpot_s += (gap_s - tpot_s) / (answer.num_tokens - 1)
    if answer is not None:  # it is good or it is not: one that is late anyway need not be in nobody's way
        return int(is_late or tpot_s > tpot_target_s)
    return is_late + (tpot_s > tpot_target_s)


def handoff_gap_s(decoder: WorkerView, running: int, transfer_s: float) -> float:
    """Between the first two tokens of a request that is handed over: as it was lately; until that is known, a step and what is
    seen of the transfer."""
    step_s = decoder.cost.step_s(running + 1)
    return step_s + transfer_s if decoder.cost.gap_s is None else max(step_s, decoder.cost.gap_s)


def handoff_s(request: RoutedRequest, prefiller: WorkerView, decoder: WorkerView, own_s: float, gap_s: float) -> float:
    """Where ways to answer are compared: what an answer that is handed over would not have to wait for where it began, and the
    answers that its prefill worker gives meanwhile not for it. ``own_s``: what computing the prompt takes alone.

    A decode worker keeps room for streams for a while after a handoff, and takes longer for the prompts that it computes
    itself: those that it has now, and, where nobody has handed over to it lately, one like this.
    """
    answer = request.answer
    if answer is None:
        return 0.0
    cost_s = stalls_s(prefiller, prefiller.running, own_s) if prefiller.running else 0.0
    if answer.num_tokens > 1:
        cost_s += gap_s - decoder.cost.step_s(decoder.running + 1)
    if request.tpot_target_s is not None:
        slowness, _ = beside_streams(decoder, decoder.running, request.tpot_target_s)
        next_s = 0.0 if decoder.gets_handoffs else own_s
        cost_s += (slowness - 1.0) * (next_s + backlog_s(decoder, decoder.queued_tokens))
    return cost_s


def _occupied_s(request: RoutedRequest, prefiller: WorkerView, running: int) -> float:
    """Time that the steps of an answer take from prompts, those that wait and the one that will come: all of them where nobody
    else answers there, and what they grow by where somebody does. So long answers are dear, and short ones are not."""
    assert request.answer is not None
    step_s = prefiller.cost.growth_s(1, prefiller.max_num_seqs) if running else prefiller.cost.step_s(1)
    num_waiting = 1.0 + prefiller.queued_tokens / request.num_tokens
    return num_waiting * (request.answer.num_tokens - 1) * step_s


def _link(prefiller: WorkerView, decoder: WorkerView, links: LinkView) -> LinkCost:
    measured = links.cost(PairKey(prefiller.incarnation, decoder.incarnation))
    if measured is not None:
        return measured
    return SAME_HOST if prefiller.host_id and prefiller.host_id == decoder.host_id else OTHER_HOST


def _seat_wait_s(request: RoutedRequest, decoder: WorkerView) -> float:
    """Wait for a place in the batch and for blocks."""
    num_blocks = -(-request.num_tokens // request.block_size)
    return batch_wait_s(decoder, decoder.running) + blocks_wait_s(decoder, num_blocks)


def batch_wait_s(decoder: WorkerView, running: int) -> float:
    """Wait for a place in the batch."""
    return decoder.cost.decode_step_s * _STEPS_TO_A_SEAT * max(0, running + 1 - decoder.max_num_seqs)


def blocks_wait_s(decoder: WorkerView, num_blocks: int) -> float:
    """Wait for blocks that others have."""
    lacking = max(0, num_blocks - decoder.available_blocks)
    return decoder.cost.decode_step_s * _STEPS_TO_A_SEAT * lacking / max(1, num_blocks)


def backlog_s(worker: WorkerView, queued_tokens: int) -> float:
    """Time to compute the prompts that are there already."""
    return queued_tokens * worker.cost.prefill_s_per_token


def crowding_s(decoder: WorkerView, running: int) -> float:
    """A fuller batch steps slower, for every token that is to come: without this, one decode worker whose link is quicker by
    a hair gets everything."""
    return _STEPS_COMPARED * decoder.cost.growth_s(running, decoder.max_num_seqs)
