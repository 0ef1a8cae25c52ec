"""The order of a worker's queue: slack, classes, and that nobody waits for ever."""

from __future__ import annotations

import itertools

from helpers.scheduling import NAMER, batch, interactive, make_request, standard

from baton.services.core.block_pool import BlockPool
from baton.services.core.scheduler.block_tables import BlockTables, Sequence
from baton.services.core.scheduler.pace import Pace
from baton.services.core.scheduler.waiting import Patience, WaitingQueue, merged
from baton.services.core.slo import ServiceLevel

PATIENCE = Patience(late_s=10.0, no_target_s=30.0, batch_s=120.0)
_ORDER = itertools.count()
_TABLES = BlockTables(BlockPool(8, 4), NAMER)


def make_queue(s_per_token: float = 0.0) -> WaitingQueue:
    return WaitingQueue(Pace(s_per_token), PATIENCE, lambda sequence: float(sequence.request.num_tokens))


def put(
    queue: WaitingQueue, name: str, service: ServiceLevel, *, num_tokens: int = 10, arrival_s: float = 0.0
) -> Sequence:
    request = make_request(name, num_tokens, arrival_s=arrival_s, service=service)
    sequence = _TABLES.open(request, next(_ORDER))
    queue.push(sequence)
    return sequence


def order(queue: WaitingQueue, now: float = 0.0) -> list[str]:
    return [sequence.request.request_id for sequence in queue.in_order(now)]


def test_the_least_slack_is_first_whenever_it_came() -> None:
    queue = make_queue(s_per_token=0.01)
    put(queue, "a", standard(5.0))
    put(queue, "b", interactive(1.0))
    put(queue, "c", standard(5.0), num_tokens=300)  # 3 s of work
    put(queue, "d", interactive(0.5))
    assert order(queue) == ["d", "b", "c", "a"]


def test_without_targets_the_order_is_arrival() -> None:
    queue = make_queue(s_per_token=0.01)
    for name, num_tokens in (("a", 10), ("b", 300), ("c", 1)):
        put(queue, name, standard(), num_tokens=num_tokens)
    assert order(queue) == ["a", "b", "c"]


def test_batch_comes_behind_all_others() -> None:
    queue = make_queue()
    put(queue, "batch", batch())
    put(queue, "patient", standard())
    put(queue, "urgent", interactive(1.0))
    assert order(queue) == ["urgent", "patient", "batch"]


def test_batch_that_gave_way_for_long_enough_is_in_its_turn() -> None:
    queue = make_queue()
    put(queue, "old", batch())
    put(queue, "new", batch(), arrival_s=50.0)
    put(queue, "standard", standard(124.0), arrival_s=119.0)
    assert order(queue, 119.9) == ["standard", "old", "new"]
    assert order(queue, 120.0) == ["old", "standard", "new"]
    assert order(queue, 170.0) == ["old", "standard", "new"]


def test_what_is_late_already_goes_behind_what_can_be_in_time_once() -> None:
    queue = make_queue()
    put(queue, "late", interactive(1.0))
    put(queue, "in time", interactive(5.0))
    assert order(queue, 0.5) == ["late", "in time"]
    assert order(queue, 2.0) == ["in time", "late"]
    put(queue, "newcomer", interactive(13.0))
    assert order(queue, 12.0)[0] == "late", "its second turn is kept, however late it is by then"


def test_under_a_flood_of_urgent_ones_everybody_has_a_turn_in_bounded_time() -> None:
    """One request is served a second, and a new urgent one comes each second as well."""
    queue = make_queue()
    waited_for = {"standard": standard(5.0), "no target": standard(), "late": standard(-5.0), "batch": batch()}
    for name, service in waited_for.items():
        put(queue, name, service)
    served_s = {}
    for second in range(400):
        put(queue, f"flood-{second}", interactive(second + 1.0), arrival_s=float(second))
        first = queue.first(float(second))
        assert first is not None
        served_s[first.request.request_id] = second
        queue.take(first, first.request.num_tokens)
    assert served_s["standard"] <= 30
    assert served_s["no target"] <= 60
    assert served_s["late"] <= 30
    assert 120 <= served_s["batch"] <= 200


def test_who_had_to_give_its_blocks_up_is_first_and_batch_is_not() -> None:
    queue = make_queue()
    ran, batched = put(queue, "ran", standard()), put(queue, "batched", batch())
    for sequence in (ran, batched):
        queue.take(sequence, 10)
    put(queue, "urgent", interactive(0.1))
    queue.push_back(batched)
    queue.push_back(ran)
    assert order(queue) == ["ran", "urgent", "batched"]
    queue.remove("ran")
    queue.remove("unknown")
    assert (order(queue), len(queue)) == (["urgent", "batched"], 2)


def test_running_and_arriving_prompts_are_merged_by_rank() -> None:
    queue = make_queue()
    going_on = put(queue, "going on", standard(5.0))
    batched = put(queue, "batched", batch())
    arrivals = [put(queue, "urgent", interactive(1.0)), put(queue, "patient", standard(9.0))]
    together = merged([going_on, batched], arrivals)
    assert [sequence.request.request_id for sequence in together] == ["urgent", "going on", "patient", "batched"]
