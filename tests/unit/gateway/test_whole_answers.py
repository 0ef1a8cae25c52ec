"""Requests that a prefill worker answers itself: who is told what, what counts where, and what happens when it is lost."""

from __future__ import annotations

import asyncio
from typing import Any

from helpers.dispatching import dispatching, hand_over, hang_up, known_link, take_over, whole
from helpers.scripted_worker import ScriptedWorker, silent
from helpers.waiting import eventually
from helpers.whole_answers import PATIENT, whole_costs

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.router import Placement, Role


def comparing(prefill: tuple[Any, ...], decode: tuple[Any, ...], **status: Any) -> Any:
    """Prices are compared, and whole answers are the cheapest."""
    status = {"answers_whole": True} | status
    return dispatching(prefill, decode, placement=Placement.AUTO, costs=whole_costs(), status=status)


def half(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """Two tokens, and then the worker is gone."""
    worker.say(spec, 0, 100, prefill=pb.PrefillReport())
    worker.say(spec, 1, 101)
    worker.die()


async def test_only_the_prefill_worker_hears_of_it() -> None:
    async with comparing((whole,), (take_over,)) as (made, (p,), (d,)):
        assert await made.generate(made.request(slo=PATIENT)) == [100, 101, 102, 103]
        made.assert_done()
        assert not p.starts[0].HasField("decode")
        assert not d.starts
        record = made.ended[0]
        receipt = made.receipts.get(record.request_id.rpartition(".")[0])
        assert receipt is not None
        decision: Any = receipt["decision"]
        assert (decision["mode"], decision["prefill"], decision["decode"]) == ("colocated", None, "prefill-0")
        assert (receipt["transfer"], receipt["cached_tokens"]) == (None, 16)
        assert decision["other_way"]["mode"] == "remote"


async def test_a_worker_of_a_release_before_is_never_asked_to() -> None:
    async with comparing((hand_over,), (take_over,), answers_whole=False) as (made, (p,), (d,)):
        assert await made.generate(made.request(slo=PATIENT)) == [100, 101, 102, 103]
        assert p.starts[0].decode == d.identity


async def test_it_counts_as_an_answer_there_and_its_prompt_until_its_first_token() -> None:
    async with comparing((silent,), (take_over,)) as (made, (p,), _):
        request = made.request(slo=PATIENT)
        generation = made.dispatcher.generate(request)
        first = asyncio.ensure_future(anext(generation))
        await eventually(lambda: bool(p.starts))
        view = next(view for view in made.registry.views() if view.role is Role.PREFILL)
        assert (view.running, view.queued_tokens) == (1, 20)
        p.say(p.starts[0].spec, 0, 100, prefill=pb.PrefillReport())
        assert (await first).first_index == 0
        view = next(view for view in made.registry.views() if view.role is Role.PREFILL)
        assert (view.running, view.queued_tokens) == (1, 0)
        await generation.aclose()
        await eventually(lambda: p.cancels == [(request.request_id, 1)])
        view = next(view for view in made.registry.views() if view.role is Role.PREFILL)
        assert view.running == 0
        made.assert_done()


async def test_what_other_gateways_have_there_counts_too() -> None:
    async with comparing((silent,), (take_over,)) as (made, (p,), _):
        made.registry.heard(p.status(answers_whole=True, answering=3))
        [view] = [view for view in made.registry.views() if view.role is Role.PREFILL]
        assert view.running == 3


async def test_the_answer_of_a_worker_that_dies_goes_on_behind_its_tokens() -> None:
    async with comparing((half, whole), (take_over,)) as (made, prefill, _):
        prefill[1].on_start = half_or_rest
        prefill[0].on_start = half_or_rest
        assert await made.generate(made.request(slo=PATIENT)) == [100, 101, 102, 103]
        made.assert_done()
        record = made.ended[0]
        assert [attempt.outcome for attempt in record.attempts] == ["worker_lost", "done"]
        second = next(start for worker in prefill for start in worker.starts if start.spec.attempt == 2)
        assert list(second.spec.token_ids) == [*range(1, 21), 100, 101]
        assert not second.HasField("decode")


def half_or_rest(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    (half if spec.attempt == 1 else whole)(worker, spec)


async def test_the_last_prefill_worker_that_dies_leaves_the_rest_to_a_decode_worker() -> None:
    async with comparing((half,), (take_over,)) as (made, _, (d,)):
        assert await made.generate(made.request(slo=PATIENT)) == [100, 101, 102, 103]
        made.assert_done()
        assert list(d.starts[0].spec.token_ids) == [*range(1, 21), 100, 101]
        assert not d.starts[0].HasField("prefill")


async def test_a_link_that_breaks_before_the_first_token_is_another_attempt() -> None:
    async with comparing((hang_up,), (take_over,)) as (made, (p,), _):
        assert await made.generate(made.request(slo=PATIENT)) == [100, 101, 102, 103]
        made.assert_done()
        assert len(p.starts) == 1
        await eventually(lambda: known_link(made, "prefill-0").is_connected)
