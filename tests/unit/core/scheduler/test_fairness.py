"""Tenants share a worker by weight, counted in tokens."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from helpers.scheduling import NAMER, batch, make_prefill, make_request, standard, step
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.services.core.block_pool import BlockPool
from baton.services.core.scheduler.block_tables import BlockTables, Sequence
from baton.services.core.scheduler.fairness import MAX_IDLE_LANES, FairQueue

MAX_TOKENS = 20


class Backlog:
    """A queue, and requests of so many tokens each, named tenant-number."""

    def __init__(self) -> None:
        self.queue = FairQueue(late_patience_s=10.0)
        self.served: Counter[str] = Counter()
        self._tables = BlockTables(BlockPool(8, 4), NAMER)
        self._order = itertools.count()

    def add(
        self, tenant: str, num_tokens: int = 10, *, weight: float = 1.0, due_s: float = 0.0, priority: int = 0
    ) -> Sequence:
        order = next(self._order)
        level = standard(tenant=tenant, weight=weight, priority=priority)
        request = make_request(f"{tenant}-{order}", num_tokens, service=level)
        sequence = self._tables.open(request, order)
        sequence.due_s = due_s
        self.queue.push(sequence)
        return sequence

    def serve(self) -> Sequence:
        sequence = next(self.queue.in_order(0.0, _cost))
        self.queue.charge(sequence.request.service, _cost(sequence), begins=True)
        self.queue.remove(sequence)
        self.served[sequence.request.service.tenant] += sequence.request.num_tokens
        return sequence


def _cost(sequence: Sequence) -> float:
    return float(sequence.request.num_tokens)


def _tenants(sequences: list[Sequence]) -> list[str]:
    return [sequence.request.service.tenant for sequence in sequences]


def test_tenants_take_turns_whoever_came_first() -> None:
    backlog = Backlog()
    for _ in range(3):
        backlog.add("flood")
    for _ in range(2):
        backlog.add("other")
    assert _tenants([backlog.serve() for _ in range(5)]) == ["flood", "other", "flood", "other", "flood"]


def test_a_tenants_priorities_order_its_own_and_urgency_those_that_are_equal() -> None:
    backlog = Backlog()
    late = [backlog.add("one", due_s=due_s, priority=5) for due_s in (1.0, 0.5)]
    middle = backlog.add("one", due_s=9.0)
    first = backlog.add("one", due_s=99.0, priority=-(2**31))
    assert [backlog.serve() for _ in range(4)] == [first, middle, late[1], late[0]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(asked=st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3)), min_size=1, max_size=30))
def test_a_priority_moves_nobody_elses_turn(asked: list[tuple[str, int]]) -> None:
    """Requests of one size: after so many turns each tenant has had as many as without priorities, but for one in a tie."""
    with_own, without = Backlog(), Backlog()
    for tenant, priority in asked:
        with_own.add(tenant, priority=priority)
        without.add(tenant)
    turns, plain = Counter[str](), Counter[str]()
    own: dict[str, list[int]] = {tenant: [] for tenant in "abc"}
    for _ in asked:
        level = with_own.serve().request.service
        own[level.tenant].append(level.priority)
        turns[level.tenant] += 1
        plain[without.serve().request.service.tenant] += 1
        assert all(abs(turns[tenant] - plain[tenant]) <= 1 for tenant in "abc")
    assert all(priorities == sorted(priorities) for priorities in own.values())


def test_the_order_foretold_is_the_order_served() -> None:
    backlog = Backlog()
    for tenant, num_tokens in zip("abcabcaab", [3, 9, 4, 12, 1, 1, 5, 2, 8], strict=True):
        backlog.add(tenant, num_tokens, weight={"a": 2.0, "b": 1.0, "c": 0.5}[tenant])
    foretold = list(backlog.queue.in_order(0.0, _cost))
    assert [backlog.serve() for _ in foretold] == foretold


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, MAX_TOKENS)), min_size=60, max_size=120),
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 4.0])] * 3),
)
def test_while_tenants_wait_what_each_gets_is_its_share_within_a_request(
    sizes: list[tuple[str, int]], weights: tuple[float, ...]
) -> None:
    backlog, weight = Backlog(), dict(zip("abc", weights, strict=True))
    waiting: Counter[str] = Counter()
    for tenant, num_tokens in sizes:
        backlog.add(tenant, num_tokens, weight=weight[tenant])
        waiting[tenant] += 1
    while all(waiting[tenant] for tenant in weight):
        waiting[backlog.serve().request.service.tenant] -= 1
        shares = [backlog.served[tenant] / weight[tenant] for tenant in weight]
        assert max(shares) - min(shares) <= MAX_TOKENS / min(weights)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(num_before=st.integers(0, 50), num_served=st.integers(0, 50), weight=st.sampled_from([0.5, 1.0, 4.0]))
def test_a_flood_delays_a_newcomer_by_its_share_of_one_request_only(
    num_before: int, num_served: int, weight: float
) -> None:
    backlog = Backlog()
    for _ in range(num_before + num_served + 60):
        backlog.add("flood", MAX_TOKENS)
    for _ in range(num_served):
        backlog.serve()
    backlog.add("newcomer", MAX_TOKENS, weight=weight)
    before = backlog.served["flood"]
    while backlog.serve().request.service.tenant == "flood":
        pass
    assert backlog.served["flood"] - before <= 2 * MAX_TOKENS


def test_who_was_away_has_saved_up_nothing() -> None:
    backlog = Backlog()
    backlog.add("away")
    backlog.serve()
    for _ in range(40):
        backlog.add("busy")
    for _ in range(20):
        backlog.serve()
    for _ in range(10):
        backlog.add("away")
    assert _tenants([backlog.serve() for _ in range(8)]).count("away") <= 5


def test_one_tenants_requests_go_by_urgency_then_by_arrival() -> None:
    backlog = Backlog()
    sequences = [backlog.add("a", due_s=due_s) for due_s in (3.0, 1.0, 3.0, 2.0)]
    assert [backlog.serve() for _ in sequences] == [sequences[index] for index in (1, 3, 0, 2)]


def test_tenants_that_come_once_are_forgotten() -> None:
    backlog = Backlog()
    for number in range(MAX_IDLE_LANES + 50):
        backlog.add(f"t{number}")
        backlog.serve()
    assert len(backlog.queue._lanes) <= MAX_IDLE_LANES + 1
    assert not len(backlog.queue)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_on_a_worker_a_flood_leaves_another_tenant_its_share_of_the_tokens(weight: float) -> None:
    scheduler = make_prefill(400, max_num_batched_tokens=16, max_num_seqs=2)
    for number in range(40):
        scheduler.add(make_request(f"flood-{number}", 16, first_token=1000 * number, service=standard(tenant="flood")))
    for number in range(20):
        level = standard(tenant="other", weight=weight)
        scheduler.add(make_request(f"other-{number}", 16, first_token=100_000 + 1000 * number, service=level))
    done: Counter[str] = Counter()
    for _ in range(20):
        for request_id, update in step(scheduler)[1].items():
            done[request_id.split("-")[0]] += update.handing_over
            scheduler.release(request_id)
    assert done["other"] == pytest.approx(20 * weight / (1 + weight), abs=2)


def test_fairness_is_inside_a_class_and_batch_waits_for_the_others() -> None:
    scheduler = make_prefill(400, max_num_batched_tokens=16)
    scheduler.add(make_request("batch", 16, service=batch(tenant="other")))
    for number in range(3):
        scheduler.add(make_request(f"r{number}", 16, first_token=1000 * number, service=standard(tenant="flood")))
    order = []
    while scheduler.has_work:
        order += [request_id for request_id, update in step(scheduler)[1].items() if update.handing_over]
    assert order == ["r0", "r1", "r2", "batch"]
