"""The dispatcher against workers that answer, fail, hang up and contradict each other: one end, tokens without a gap."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from helpers.scripted_worker import Behaviour, ScriptedWorker, run_worker, silent
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.ladder_steps import LadderLimits
from baton.services.core.lifecycle import Instant
from baton.services.core.prefix_index import PrefixIndex
from baton.services.core.request import FinishReason, SamplingParams
from baton.services.core.router import Role
from baton.services.gateway.dispatch import WorkerDispatcher
from baton.services.gateway.generation import GenerationRequest
from baton.services.gateway.receipts import GenerationRecord, ReceiptBook
from baton.services.gateway.registry import Registry
from baton.services.gateway.worker_link import WorkerLink

GATEWAY = pb.WorkerIdentity(worker_id="gateway", incarnation="g")
PROMPT = list(range(1, 21))
NUM_TOKENS = 4
TRANSFER = pb.TransferReport(transport="shm", num_blocks=2, num_bytes=200, duration_ms=1.0)
_ids = itertools.count()


def whole(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """A decode worker that prefills itself, or goes on: tokens are 100 + index."""
    first = len(spec.token_ids) - spec.num_prompt_tokens
    worker.say(
        spec, first, *range(100 + first, 100 + NUM_TOKENS), finish_reason=pb.FINISH_REASON_LENGTH,
        prefill=pb.PrefillReport(cached_tokens=16),
    )  # fmt: skip


def hand_over(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """A prefill worker whose handoff works."""
    first = len(spec.token_ids) - spec.num_prompt_tokens
    worker.say(spec, first, 100 + first)
    worker.say(spec, 0, handed_over=True)


def take_over(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """A decode worker that gets the blocks, or prefills itself."""
    if not worker.starts[-1].HasField("prefill"):
        whole(worker, spec)
        return
    worker.say(spec, 0, transfer=TRANSFER)
    first = len(spec.token_ids) - spec.num_prompt_tokens + 1
    worker.say(spec, first, *range(100 + first, 100 + NUM_TOKENS), finish_reason=pb.FINISH_REASON_LENGTH)


class Dispatching:
    def __init__(self, limits: LadderLimits) -> None:
        self.ended: list[GenerationRecord] = []
        self.receipts = ReceiptBook(self.ended.append)
        self.now_s = 0.0
        self.registry = Registry(GATEWAY, clock=lambda: self.now_s)
        self.num_started = 0
        self.dispatcher = WorkerDispatcher(
            self.registry,
            PrefixIndex(),
            b"key",
            self.receipts,
            clock=lambda: self.now_s,
            limits=limits,
            on_start=self._count,
        )

    def _count(self) -> None:
        self.num_started += 1

    def request(self, **fields: Any) -> GenerationRequest:
        name = f"r{next(_ids)}"
        made = GenerationRequest(
            f"{name}.0", name, "m", PROMPT, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0), **fields
        )
        made.trace.mark(Instant.RECEIVED, 0.0)
        return made

    async def generate(self, request: GenerationRequest) -> list[int]:
        tokens: list[int] = []
        reasons: list[FinishReason | None] = []
        async for delta in self.dispatcher.generate(request):
            assert delta.first_index == len(tokens)
            tokens += [token.token_id for token in delta.tokens]
            reasons.append(delta.finish_reason)
        assert [reason for reason in reasons if reason] == [FinishReason.LENGTH]
        return tokens

    def assert_done(self) -> None:
        """Every generation ended once, and no link remembers one."""
        assert len(self.ended) == self.num_started
        assert not self.dispatcher.num_running
        assert [known.link.num_inflight for known in self.registry] == [0] * len(list(self.registry))


@asynccontextmanager
async def dispatching(
    prefill: tuple[Behaviour, ...] = (), decode: tuple[Behaviour, ...] = (), **limits: Any
) -> AsyncIterator[tuple[Dispatching, list[ScriptedWorker], list[ScriptedWorker]]]:
    async with AsyncExitStack() as stack:
        pools = [
            [
                await stack.enter_async_context(run_worker(f"{role.value}-{n}", role, b))
                for n, b in enumerate(behaviours)
            ]
            for role, behaviours in ((Role.PREFILL, prefill), (Role.DECODE, decode))
        ]
        made = Dispatching(LadderLimits(**limits))
        stack.push_async_callback(made.registry.close)
        for worker in (*pools[0], *pools[1]):
            made.registry.heard(worker.status())
        await eventually(lambda: len(made.registry.views()) == len(prefill) + len(decode))
        yield made, *pools


async def test_a_pair_answers_and_both_are_released() -> None:
    async with dispatching((hand_over,), (take_over,)) as (made, (p,), (d,)):
        request = made.request()
        assert await made.generate(request) == [100, 101, 102, 103]
        made.assert_done()
        record = made.ended[0]
        assert (record.outcome, record.completion_tokens, record.fallbacks) == ("length", 4, [])
        assert record.transfer == TRANSFER
        assert d.starts[0].prefill == p.identity
        assert (p.starts[0].decode, p.starts[0].decode_address) == (d.identity, d.address)
        assert not p.cancels + d.cancels


async def test_closing_the_generator_cancels_on_both_workers() -> None:
    async with dispatching((hand_over,), (silent,)) as (made, _, (d,)):
        request = made.request()
        generation = made.dispatcher.generate(request)
        assert (await anext(generation)).first_index == 0
        await generation.aclose()
        await eventually(lambda: d.cancels == [(request.request_id, 1)])
        assert [record.outcome for record in made.ended] == ["abort"]
        made.assert_done()


async def test_the_api_layers_own_end_is_the_outcome_and_is_counted_once() -> None:
    async with dispatching((), (lambda w, s: w.say(s, 0, 100),)) as (made, _, (d,)):
        request = made.request()
        generation = made.dispatcher.generate(request)
        await anext(generation)
        made.dispatcher.finish(request, "stop")
        await generation.aclose()
        assert [record.outcome for record in made.ended] == ["stop"]
        await eventually(lambda: bool(d.cancels))
        made.assert_done()


async def test_a_failed_handoff_goes_elsewhere_and_the_gap_is_closed() -> None:
    def fail_after_the_first(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100)
        worker.fail(spec, ErrorCode.HANDOFF_FAILED)

    async with dispatching((fail_after_the_first,), (take_over,)) as (made, _, (d,)):
        # The decode worker gets nothing in the first attempt: its part is silence.
        d.on_start = lambda worker, spec: whole(worker, spec) if spec.attempt > 1 else None
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        assert made.ended[0].fallbacks == ["local_prefill"]
        assert [attempt.outcome for attempt in made.ended[0].attempts] == ["kv_handoff_failed", "done"]
        # What came is not asked for again.
        assert list(d.starts[-1].spec.token_ids) in ([*PROMPT, 100], PROMPT)
        assert d.starts[-1].spec.num_prompt_tokens == len(PROMPT)
        await eventually(lambda: bool(d.cancels))
        made.assert_done()


def hang_up(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    worker.hang_up()


def fail_handoff(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    worker.fail(spec, ErrorCode.HANDOFF_FAILED)


def known_link(made: Dispatching, worker_id: str) -> WorkerLink:
    known = made.registry.get(worker_id)
    assert known is not None
    return known.link


@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_prefill_worker_lost_behind_its_handoff_ends_nothing(is_lost: bool) -> None:
    """The acknowledgement was lost, or the worker is: the decode worker has all that it needs."""

    def lose_the_acknowledgement(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100)

    async with dispatching((lose_the_acknowledgement,), (silent,)) as (made, (p,), (d,)):
        generation = made.dispatcher.generate(made.request())
        await anext(generation)
        spec = d.starts[0].spec
        d.say(spec, 1, 101, transfer=TRANSFER)
        await anext(generation)
        rest = asyncio.ensure_future(anext(generation))
        (hang_up if is_lost else fail_handoff)(p, spec)
        link = known_link(made, "prefill-0")
        await eventually(lambda: not link.num_inflight)
        d.say(spec, 2, 102, 103, finish_reason=pb.FINISH_REASON_LENGTH)
        assert len((await rest).tokens) == 2
        assert [delta async for delta in generation] == []
        assert made.ended[0].fallbacks == []
        made.assert_done()


@pytest.mark.parametrize("num_lost", [1, 2])
async def test_a_request_that_lost_two_workers_is_not_tried_on_a_third(num_lost: int) -> None:
    def behave(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        (hang_up if spec.attempt <= num_lost else whole)(worker, spec)

    async with dispatching((), (behave,) * 3) as (made, _, decode):
        generation = made.generate(made.request())
        if num_lost == 1:
            assert await generation == [100, 101, 102, 103]
        else:
            with pytest.raises(BatonError) as failure:
                await generation
            assert failure.value.code is ErrorCode.QUARANTINED
            assert made.ended[0].outcome == "error"
        assert sum(len(worker.starts) for worker in decode) == 2
        made.assert_done()


async def test_a_stream_that_broke_is_waited_for_where_nobody_else_is_there() -> None:
    def hang_up_after_two(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100, 101)
        asyncio.get_running_loop().call_later(0.02, worker.hang_up)

    async with dispatching((), (hang_up_after_two,)) as (made, _, (d,)):
        generation = made.dispatcher.generate(made.request())
        assert (await anext(generation)).first_index == 0
        d.on_start = whole
        rest = [delta async for delta in generation]
        assert [(delta.first_index, len(delta.tokens)) for delta in rest] == [(2, 2)]
        assert made.ended[0].fallbacks == ["queued", "same_workers"]
        assert list(d.starts[-1].spec.token_ids) == [*PROMPT, 100, 101]
        made.assert_done()


async def test_a_request_waits_for_the_first_worker_and_is_counted() -> None:
    async with dispatching() as (made, _, _):
        waiting = asyncio.ensure_future(made.generate(made.request()))
        await eventually(lambda: made.dispatcher.num_waiting == 1)
        async with run_worker("late", Role.DECODE, whole) as worker:
            made.registry.heard(worker.status())
            assert await waiting == [100, 101, 102, 103]
            assert made.dispatcher.num_waiting == 0
            assert made.ended[0].fallbacks == ["queued"]
            made.assert_done()


async def test_a_worker_that_refuses_is_asked_again_after_a_pause() -> None:
    def refuse_twice(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt <= 2:
            worker.fail(spec, ErrorCode.DRAINING)
        else:
            whole(worker, spec)

    async with dispatching((), (refuse_twice,), first_pause_s=0.01) as (made, _, _decode):
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        assert [attempt.outcome for attempt in made.ended[0].attempts] == ["draining", "draining", "done"]
        made.assert_done()


async def test_a_decode_worker_that_fails_leaves_the_prefill_worker_its_prompt() -> None:
    """The prompt is computed already: another decode worker takes it from the same prefill worker."""

    def fail_first(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        (hang_up if spec.attempt == 1 else take_over)(worker, spec)

    async with dispatching((hand_over,) * 4, (fail_first,) * 2) as (made, _, _decode):
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        first, second = (attempt.decision.chosen for attempt in made.ended[0].attempts)
        assert first.prefill is not None
        assert second.prefill is not None
        assert second.prefill.incarnation == first.prefill.incarnation
        assert second.decode.incarnation != first.decode.incarnation
        assert made.ended[0].fallbacks == ["other_decode"]
        made.assert_done()


async def test_a_prefill_worker_that_fails_leaves_the_decode_worker_its_blocks() -> None:
    def fail_first(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        (hang_up if spec.attempt == 1 else hand_over)(worker, spec)

    def take_second(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt > 1:
            take_over(worker, spec)

    async with dispatching((fail_first,) * 2, (take_second,) * 4) as (made, _, _decode):
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        first, second = (attempt.decision.chosen for attempt in made.ended[0].attempts)
        assert second.decode.incarnation == first.decode.incarnation
        assert made.ended[0].fallbacks == ["other_prefill"]
        made.assert_done()


async def test_after_three_pairs_decode_workers_are_asked_to_do_it_alone() -> None:
    async with dispatching((fail_handoff,) * 4, (take_over,)) as (made, _, (d,)):
        d.on_start = lambda worker, spec: None if worker.starts[-1].HasField("prefill") else whole(worker, spec)
        assert await made.generate(made.request()) == [100, 101, 102, 103]
        modes = [attempt.decision.chosen.mode.value for attempt in made.ended[0].attempts]
        assert modes == ["remote", "remote", "remote", "local"]
        assert made.ended[0].fallbacks == ["other_prefill", "other_prefill", "local_prefill"]
        made.assert_done()


async def test_an_error_that_another_attempt_cannot_mend_is_raised_at_once() -> None:
    def refuse(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.fail(spec, ErrorCode.CONTEXT_LENGTH_EXCEEDED, retryable=False)

    async with dispatching((), (refuse, refuse)) as (made, _, decode):
        with pytest.raises(BatonError) as failure:
            await made.generate(made.request())
        assert failure.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
        assert sum(len(worker.starts) for worker in decode) == 1
        made.assert_done()


async def test_attempts_are_bounded() -> None:
    def refuse(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.fail(spec, ErrorCode.INTERNAL)

    async with dispatching((), (refuse,) * 4, max_attempts=3) as (made, _, decode):
        with pytest.raises(BatonError):
            await made.generate(made.request())
        assert sum(len(worker.starts) for worker in decode) == 3
        made.assert_done()


async def test_without_workers_a_request_is_refused() -> None:
    async with dispatching(max_wait_s=0.05) as (made, _, _):
        with pytest.raises(BatonError) as failure:
            await made.generate(made.request())
        assert failure.value.code is ErrorCode.NO_WORKERS
        assert failure.value.retry_after_s
        assert (made.ended[0].outcome, made.ended[0].missed_because) == ("refused", "refused")
        made.assert_done()


async def test_tokens_that_come_twice_end_the_request_with_an_error() -> None:
    def stutter(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100, 101)
        asyncio.get_running_loop().call_later(0.05, lambda: worker.say(spec, 1, 101))

    async with dispatching((), (stutter,)) as (made, _, (d,)):
        with pytest.raises(BatonError, match="again"):
            await made.generate(made.request())
        await eventually(lambda: bool(d.cancels))
        assert made.ended[0].outcome == "error"
        made.assert_done()


async def test_time_that_runs_out_ends_the_request_and_cancels_it() -> None:
    async with dispatching((silent,), (silent,)) as (made, (p,), (d,)):
        with pytest.raises(BatonError) as failure:
            await made.generate(made.request(timeout_s=0.05))
        assert failure.value.code is ErrorCode.DEADLINE_EXCEEDED
        assert 1 <= d.starts[0].spec.deadline_ms <= 50
        await eventually(lambda: bool(p.cancels and d.cancels))
        made.assert_done()


async def test_no_attempt_is_made_when_the_time_is_over() -> None:
    async with dispatching((), (silent, silent)) as (made, _, decode):
        waiting = asyncio.ensure_future(made.generate(made.request(timeout_s=60.0)))
        await eventually(lambda: any(worker.starts for worker in decode))
        made.now_s = 61.0
        (first,) = [worker for worker in decode if worker.starts]
        first.fail(first.starts[0].spec, ErrorCode.INTERNAL)
        with pytest.raises(BatonError):
            await waiting
        assert sum(len(worker.starts) for worker in decode) == 1
        made.assert_done()


async def test_cached_tokens_are_those_of_the_attempt_that_computed_the_prompt() -> None:
    def fail_first(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt == 1:
            worker.fail(spec, ErrorCode.INTERNAL)
        else:
            whole(worker, spec)

    async with dispatching((), (fail_first, fail_first)) as (made, _, _decode):
        await made.generate(made.request())
        assert made.ended[0].cached_tokens == 16
        made.assert_done()


async def test_a_worker_that_freezes_is_replaced_and_its_late_tokens_are_not_served() -> None:
    def begin(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt > 1:
            whole(worker, spec)
            return
        worker.say(spec, 0, 100)
        asyncio.get_running_loop().call_later(0.05, worker.freeze)

    async with dispatching((), (begin, begin)) as (made, _, decode):
        generation = made.dispatcher.generate(made.request())
        assert (await anext(generation)).first_index == 0
        (frozen,) = [worker for worker in decode if worker.starts]
        rest = [delta async for delta in generation]
        assert [token.token_id for delta in rest for token in delta.tokens] == [101, 102, 103]
        assert made.ended[0].fallbacks == ["other_decode"]
        frozen.say(frozen.starts[0].spec, 1, 999)
        frozen.wake()
        await eventually(lambda: len(made.registry.views()) == 2, what="its return")
        made.assert_done()
