"""The dispatcher against workers that answer, fail and contradict each other: one end, tokens without a gap."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from helpers.dispatching import (
    TRANSFER,
    Dispatching,
    dispatching,
    hand_over,
    known_link,
    take_over,
    whole,
)
from helpers.scripted_worker import ScriptedWorker, silent
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.request import FinishReason, SamplingParams
from baton.services.core.tenants import Tenant
from baton.services.core.token_order import TokenDelta
from baton.services.gateway.generation import SloTarget


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
        made.dispatcher.finish(request, "stop", 1)
        await generation.aclose()
        assert [record.outcome for record in made.ended] == ["stop"]
        await eventually(lambda: bool(d.cancels))
        made.assert_done()


async def test_the_api_layers_own_end_counts_also_when_the_last_token_came_with_the_first() -> None:
    """A decode worker that is done before the first token arrives: all that it said comes out at once."""

    def hand_over_late(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        asyncio.get_running_loop().call_later(0.1, lambda: hand_over(worker, spec))

    for is_stopped, outcome in ((True, "stop"), (False, "abort")):
        async with dispatching((hand_over_late,), (take_over,)) as (made, _, _):
            request = made.request()
            generation = made.dispatcher.generate(request)
            assert (await anext(generation)).finish_reason is None
            if is_stopped:
                made.dispatcher.finish(request, "stop", 1)
            await generation.aclose()
            assert [record.outcome for record in made.ended] == [outcome]
            if is_stopped:
                assert [record.completion_tokens for record in made.ended] == [1]
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
        await eventually(lambda: bool(p.cancels and d.cancels))
        assert 1 <= d.starts[0].spec.deadline_ms <= 50
        made.assert_done()


async def test_both_workers_are_told_what_was_promised_and_what_is_left_of_it() -> None:
    async with dispatching((hand_over,), (take_over,)) as (made, (p,), (d,)):
        made.now_s = 0.25  # since the request was received
        slo = SloTarget("interactive", ttft_ms=400.0)
        await made.generate(made.request(slo=slo, tenant=Tenant("t", "name", weight=2.0)))
        told = p.starts[0].spec.service
        assert told == d.starts[0].spec.service
        assert (told.request_class, told.tenant, told.weight) == (pb.REQUEST_CLASS_INTERACTIVE, "t", 2.0)
        assert (told.ttft_left_ms, told.tpot_ms) == pytest.approx((150.0, 100.0))


async def test_a_stream_that_goes_on_elsewhere_is_promised_its_next_token() -> None:
    def say_one(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        if spec.attempt > 1:
            whole(worker, spec)
        else:
            worker.say(spec, 0, 100)

    async with dispatching((), (say_one, say_one)) as (made, _, decode):
        made.now_s = 3.0
        request = made.request(slo=SloTarget("standard", ttft_ms=400.0, tpot_ms=50.0))
        generation = made.dispatcher.generate(request)
        await anext(generation)
        (first,) = [worker for worker in decode if worker.starts]
        assert first.starts[0].spec.service.ttft_left_ms == pytest.approx(-2600.0)
        first.fail(first.starts[0].spec, ErrorCode.INTERNAL)
        assert sum([len(delta.tokens) async for delta in generation]) == 3
        (second,) = [start.spec for worker in decode for start in worker.starts if start.spec.attempt == 2]
        assert second.service.ttft_left_ms == pytest.approx(50.0)


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


async def _deltas_of(made: Dispatching, worker: ScriptedWorker, outputs: list[pb.RequestOutput]) -> list[TokenDelta]:
    """Of a generation whose outputs are all there, each on its own, before the first is looked at."""
    request = made.request()
    request.sampling = SamplingParams(max_tokens=sum(len(output.tokens) for output in outputs), temperature=0.0)
    generation = made.dispatcher.generate(request)
    first = asyncio.ensure_future(anext(generation))
    await eventually(lambda: bool(worker.starts))
    link = known_link(made, "decode-0")
    for output in outputs:
        output.request_id, output.attempt = request.request_id, 1
        link._deliver(output)
    link._bell.ring()
    deltas = [await first]
    async for delta in generation:
        deltas.append(delta)
    return deltas


def _said(first_index: int, *token_ids: int, **fields: Any) -> pb.RequestOutput:
    return pb.RequestOutput(first_index=first_index, tokens=[pb.Token(token_id=i) for i in token_ids], **fields)


async def test_tokens_that_wait_are_passed_on_together_up_to_what_says_more() -> None:
    outputs = [
        _said(0, 100, prefill=pb.PrefillReport()),
        _said(1, 101),
        _said(2, 102, 103),
        _said(4, 104, transfer=TRANSFER),
        _said(5, 105),
        _said(6, 106, finish_reason=pb.FINISH_REASON_LENGTH),
    ]
    async with dispatching((), (silent,)) as (made, _, (d,)):
        deltas = await _deltas_of(made, d, outputs)
        told = [(delta.first_index, [token.token_id for token in delta.tokens]) for delta in deltas]
        assert told == [(0, [100]), (1, [101, 102, 103]), (4, [104]), (5, [105]), (6, [106])]
        assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.LENGTH]
        record = made.ended[0]
        assert (record.outcome, record.completion_tokens, record.transfer) == ("length", 7, TRANSFER)
        made.assert_done()


async def test_no_more_than_a_bounded_number_of_tokens_is_passed_on_together() -> None:
    outputs = [_said(0, 7, prefill=pb.PrefillReport()), *(_said(index, 7) for index in range(1, 300))]
    outputs.append(_said(300, 7, finish_reason=pb.FINISH_REASON_LENGTH))
    async with dispatching((), (silent,)) as (made, _, (d,)):
        sizes = [len(delta.tokens) for delta in await _deltas_of(made, d, outputs)]
        assert sizes == [1, 64, 64, 64, 64, 43, 1]
        made.assert_done()
