"""What the dispatcher learns from a fetch: it counts for and against the way from the holder to the needer."""

from __future__ import annotations

from functools import partial

import pytest
from helpers.dispatching import BLOCK_KEY, PROMPT, Dispatching, dispatching, hand_over, take_over
from helpers.scripted_worker import ScriptedWorker, silent

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.block_hash import BlockNamer
from baton.services.core.fetch import FetchMode, FetchPolicy
from baton.services.core.links import PairKey

ALWAYS = FetchPolicy(FetchMode.ALWAYS)


def fetching(worker: ScriptedWorker, spec: pb.GenerationSpec, error: str = "") -> None:
    """A prefill worker that does as it is told, and says how the fetch went."""
    if worker.starts[-1].HasField("fetch"):
        report = pb.FetchReport(holder="decode-0", transport="shm", num_blocks=1, num_bytes=100, duration_ms=1.0)
        if error:
            report = pb.FetchReport(holder="decode-0", error=pb.ErrorDetail(code=error, message="no blocks"))
        worker.say(spec, 0, fetch=report)
    hand_over(worker, spec)


def hold(made: Dispatching, worker: ScriptedWorker) -> None:
    """The worker has announced the prompt's full block."""
    names = BlockNamer(BLOCK_KEY, "f").names(PROMPT, 16)[:1]
    made.prefix_index.apply(worker.identity.worker_id, worker.incarnation, 1, names, (), snapshot=True)


def way(holder: ScriptedWorker, needer: ScriptedWorker) -> PairKey:
    return PairKey(holder.incarnation, needer.incarnation)


async def test_a_fetch_that_failed_on_its_way_counts_against_it_and_the_next_request_computes() -> None:
    async with dispatching((partial(fetching, error="peer_lost"),), (take_over,), ALWAYS) as (made, (p,), (d,)):
        hold(made, d)
        await made.generate(made.request())
        await made.generate(made.request())
        assert [start.HasField("fetch") for start in p.starts] == [True, False]
        assert made.links.get(way(d, p)).num_failures == 1
        assert [record.fallbacks for record in made.ended] == [["fetch_failed"], []]
        made.now_s += 5.0
        await made.generate(made.request())
        assert p.starts[-1].HasField("fetch")
        made.assert_done()


@pytest.mark.parametrize("code", ["evicted", "no_capacity"])
async def test_a_holder_that_says_no_is_asked_again(code: str) -> None:
    async with dispatching((partial(fetching, error=code),), (take_over,), ALWAYS) as (made, (p,), (d,)):
        hold(made, d)
        for _ in range(2):
            await made.generate(made.request())
        assert [start.HasField("fetch") for start in p.starts] == [True, True]
        assert made.links.get(way(d, p)).num_failures == 0


async def test_a_fetch_that_came_through_counts_for_its_way() -> None:
    async with dispatching((fetching,), (take_over,), ALWAYS) as (made, (p,), (d,)):
        hold(made, d)
        pair = way(d, p)
        made.links.on_fetch_failed(pair, "peer_lost", made.now_s)
        made.now_s += 5.0
        await made.generate(made.request())
        assert made.links.get(pair).num_transfers == 1
        assert made.links.num_failures(pair, made.now_s) == 0
        assert made.links.may_fetch(pair, made.now_s)


async def test_a_fetch_whose_request_was_given_up_leaves_the_next_one_its_try() -> None:
    def say_one(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
        worker.say(spec, 0, 100)

    async with dispatching((say_one,), (silent,), ALWAYS) as (made, (p,), (d,)):
        hold(made, d)
        pair = way(d, p)
        made.links.on_fetch_failed(pair, "peer_lost", made.now_s)
        made.now_s += 5.0
        generation = made.dispatcher.generate(made.request())
        await anext(generation)
        assert p.starts[-1].HasField("fetch")
        assert not made.links.may_fetch(pair, made.now_s)
        await generation.aclose()
        assert made.links.may_fetch(pair, made.now_s)
        made.assert_done()
