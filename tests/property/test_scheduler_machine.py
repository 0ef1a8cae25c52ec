"""Both schedulers under any order of events: no block is lost, no data wrong, every request ends once, none waits for ever."""

from __future__ import annotations

import random

import pytest
from helpers.scheduler_world import MAX_MODEL_LEN, Handoff, World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.services.core.slo import ServiceLevel, SloClass

# Few starts and few tails, so that prompts share prefixes, whole and in part.
PROMPTS = st.builds(
    lambda start, length, tail: [100 * start + position for position in range(length)] + [tail] * (tail % 3),
    start=st.integers(1, 2),
    length=st.integers(1, 28),
    tail=st.integers(0, 2),
)
SALTS = st.sampled_from(["", "tenant"])
LIFETIMES = st.sampled_from([None, None, None, 3.0])
INDEX = st.integers(0, 5)
SERVICES = st.builds(
    ServiceLevel,
    slo_class=st.sampled_from(SloClass),
    next_token_due_s=st.sampled_from([None, 0.0, 1.0, 5.0]),
    tpot_s=st.sampled_from([None, 0.1]),
    tenant=st.sampled_from(["", "a", "b"]),
    weight=st.sampled_from([1.0, 4.0]),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(quantile_tokens=st.sampled_from([1, 1, 4, 16]), prefix_caching=st.sampled_from([True, True, False]))
    def begin(self, quantile_tokens: int, prefix_caching: bool) -> None:
        self.world = World(quantile_tokens=quantile_tokens, prefix_caching=prefix_caching)

    def pick(self, index: int) -> Handoff:
        """Those with a grant first: most can go wrong with them."""
        handoffs = sorted(self.world.handoffs, key=lambda handoff: handoff.reservation is None)
        return handoffs[index % len(handoffs)]

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=3),
        max_tokens=st.integers(1, 24),
        salt=SALTS,
        lifetime_s=LIFETIMES,
        service=SERVICES,
    )
    def start_remote(
        self, prompts: list[list[int]], max_tokens: int, salt: str, lifetime_s: float | None, service: ServiceLevel
    ) -> None:
        for prompt in prompts:
            num_tokens = min(max_tokens, MAX_MODEL_LEN - len(prompt))
            self.world.start_remote(prompt, num_tokens, salt, lifetime_s, service)

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=2),
        max_tokens=st.integers(1, 24),
        salt=SALTS,
        lifetime_s=LIFETIMES,
        service=SERVICES,
    )
    def start_local(
        self, prompts: list[list[int]], max_tokens: int, salt: str, lifetime_s: float | None, service: ServiceLevel
    ) -> None:
        for prompt in prompts:
            num_tokens = min(max_tokens, MAX_MODEL_LEN - len(prompt))
            self.world.start_local(prompt, num_tokens, salt, lifetime_s, service)

    @rule(
        prompts=st.lists(PROMPTS, min_size=1, max_size=2),
        max_tokens=st.integers(1, 24),
        salt=SALTS,
        lifetime_s=LIFETIMES,
        service=SERVICES,
    )
    def start_whole(
        self, prompts: list[list[int]], max_tokens: int, salt: str, lifetime_s: float | None, service: ServiceLevel
    ) -> None:
        for prompt in prompts:
            num_tokens = min(max_tokens, MAX_MODEL_LEN - len(prompt))
            self.world.start_whole(prompt, num_tokens, salt, lifetime_s, service)

    @rule(steps=st.integers(1, 6))
    def step_prefill(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step_prefill()

    @rule(steps=st.integers(1, 6))
    def step_decode(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step_decode()

    @rule(steps=st.integers(2, 10))
    def compute_and_reserve(self, steps: int) -> None:
        """What workers do by themselves."""
        for _ in range(steps):
            self.world.step_prefill()
            for handoff in tuple(self.world.handoffs):
                self.world.reserve(handoff)
            self.world.step_decode()

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @precondition(lambda self: self.world.handoffs)
    @rule(index=INDEX)
    def reserve(self, index: int) -> None:
        self.world.reserve(self.pick(index))

    @precondition(lambda self: self.world.handoffs)
    @rule(index=INDEX, blocks=st.integers(1, 7), is_last=st.booleans())
    def push(self, index: int, blocks: int, is_last: bool) -> None:
        handoff = self.pick(index)
        for _ in range(blocks):
            self.world.push(handoff)
        if is_last:
            self.world.commit(handoff)

    @precondition(lambda self: self.world.requests)
    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        self.world.cancel(self.world.requests[-1 - index % len(self.world.requests)])

    @precondition(lambda self: self.world.handoffs)
    @rule(index=INDEX, quiet=st.booleans())
    def break_transfer(self, index: int, quiet: bool) -> None:
        self.world.break_transfer(self.pick(index), quiet=quiet)

    @precondition(lambda self: any(handoff.reservation for handoff in self.world.handoffs))
    @rule(how=st.sampled_from(["cancel", "break", "break, and writes may land"]))
    def fail_after_the_grant(self, how: str) -> None:
        if how == "cancel":
            self.world.cancel(self.pick(0).receiver)
        else:
            self.world.break_transfer(self.pick(0), quiet=how == "break")

    @precondition(lambda self: self.world.lingering)
    @rule(index=INDEX)
    def let_go(self, index: int) -> None:
        self.world.let_go(self.world.lingering[index % len(self.world.lingering)])

    @precondition(lambda self: self.world.quarantines)
    @rule(index=INDEX, has_ended=st.booleans())
    def late_write(self, index: int, has_ended: bool) -> None:
        handoff = self.world.quarantines[index % len(self.world.quarantines)]
        self.world.late_write(handoff)
        if has_ended:
            self.world.end_quarantine(handoff)

    @invariant()
    def blocks_are_conserved(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()
            self.world.check()
            self.world.check_end()


TestSchedulers = SchedulerMachine.TestCase
TestSchedulers.settings = settings(max_examples=70, stateful_step_count=50, deadline=None, derandomize=True)


@pytest.mark.parametrize("seed", range(20))
def test_tiny_pools_under_steady_load_make_progress(seed: int) -> None:
    """More work than both pools hold, without faults: everything is served to its end, and rightly."""
    rng = random.Random(seed)
    world = World(quantile_tokens=rng.choice([1, 4, 16]))
    for _ in range(40):
        length = rng.randint(1, 28)
        start = rng.randint(1, 3) * 100
        prompt = [start + position for position in range(length)]
        begin = rng.choice([world.start_remote, world.start_remote, world.start_local, world.start_whole])
        slo_class = rng.choice(list(SloClass))
        due_s = None if rng.random() < 0.3 else world.now + rng.random()
        service = ServiceLevel(slo_class, due_s, tenant=rng.choice("ab"), weight=rng.choice([1.0, 3.0]))
        begin(prompt, rng.randint(1, MAX_MODEL_LEN - length), "", None, service)
        world.now += 0.05
        for _ in range(rng.randint(0, 3)):
            world.step_prefill()
            world.step_decode()
            for handoff in tuple(world.handoffs):
                world.reserve(handoff)
                world.push(handoff)
                world.commit(handoff)
            world.check()
    world.drain()
    world.check_end()
    assert all(request.finish_reason is not None for request in world.requests)


def test_the_load_above_does_preempt_and_does_hit_the_cache() -> None:
    """Otherwise the tests above would say little."""
    rng = random.Random(7)
    world = World(quantile_tokens=1)
    for _ in range(20):
        world.start_local([100 + position for position in range(rng.randint(4, 12))], 24, "", None)
    world.drain()
    world.check_end()
    assert world.num_preemptions > 0
    assert world.num_cached_tokens > 0
