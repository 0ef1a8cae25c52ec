"""Turns of a conversation: the blocks that decode made are found again, wherever the next turn is prefilled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import BLOCK_KEY, Cluster, Generated, run_cluster
from helpers.oracle import NUM_OUTPUT_TOKENS, Subject, expected_tokens, make_prompt
from helpers.waiting import eventually

from baton.services.core.block_hash import BlockNamer
from baton.services.core.fetch import FetchMode, FetchPolicy
from baton.services.core.router import Placement, Role

# However loaded the machine is, blocks that come are waited for.
ALWAYS = FetchPolicy(FetchMode.ALWAYS, min_patience_s=60.0)
IMPATIENT = FetchPolicy(FetchMode.ALWAYS, min_patience_s=0.2)
OFF = FetchPolicy(FetchMode.OFF)
MODES = {"colocated": ("colocated", "auto"), "shm": ("disaggregated", "shm"), "tcp": ("disaggregated", "tcp")}


@pytest.fixture
def subject(get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject("qwen3")


class Conversation:
    """Asks turn after turn, each from all that was said before."""

    def __init__(self, cluster: Cluster, subject: Subject, first: Sequence[int], worker_id: str) -> None:
        self.cluster, self.subject, self.worker_id = cluster, subject, worker_id
        self.said = tuple(first)
        self.namer = BlockNamer(BLOCK_KEY, subject.loaded.fingerprint)
        self.last: Generated | None = None

    async def turn(self, new: Sequence[int] = (), **options: Any) -> Generated:
        prompt = (*self.said, *new)
        generated = await self.cluster.generate(prompt, ignore_eos=True, **options)
        assert generated.token_ids == expected_tokens(self.subject, prompt)
        assert generated.indices == list(range(NUM_OUTPUT_TOKENS))
        self.said, self.last = (*prompt, *generated.token_ids), generated
        await eventually(
            lambda: self.num_announced >= self.num_computed // 16, what="the announcement of the blocks", timeout_s=30.0
        )
        return generated

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is somewhere: nobody computed that of the last one."""
        return len(self.said) - 1

    @property
    def num_announced(self) -> int:
        names = self.namer.names(list(self.said[: self.num_computed]), 16)
        return self.cluster.prefix_index.matches(names).get(self.worker_id, 0)

    def receipt(self) -> Any:
        assert self.last is not None
        return self.cluster.receipts.get(self.last.receipt_id)


def host_of(cluster: Cluster, worker_id: str) -> Any:
    return next(host for host in cluster.hosts if host.identity.worker_id == worker_id)


def num_computed_by(cluster: Cluster, role: str) -> int:
    """Prompt tokens that a worker's engine has computed."""
    total: int = cluster.host(role).worker.speed.prompt_tokens_total  # type: ignore[union-attr]
    return total


@pytest.mark.parametrize("fetch", [ALWAYS, OFF], ids=["fetch", "no-fetch"])
@pytest.mark.parametrize("mode", MODES)
async def test_every_turn_gives_the_same_tokens_and_reuses_all_full_blocks_of_the_ones_before(
    mode: str, fetch: FetchPolicy, subject: Subject, key_file: Path
) -> None:
    topology, transport = MODES[mode]
    is_pair = topology == "disaggregated"
    async with run_cluster(
        subject.loaded, key_file, mode=topology, transport=transport, max_num_batched_tokens=64, fetch=fetch
    ) as cluster:
        talk = Conversation(cluster, subject, make_prompt(40, seed=1), "decode-1" if is_pair else "colocated-0")
        assert (await talk.turn()).cached_tokens == 0
        for length, seed in ((10, 2), (1, 3), (100, 4)):
            num_reused = min(talk.num_computed, len(talk.said) + length - 1) // 16 * 16
            prefiller = "prefill" if is_pair else "colocated"
            before = num_computed_by(cluster, prefiller)
            generated = await talk.turn(make_prompt(length, seed))
            num_prompt = len(talk.said) - NUM_OUTPUT_TOKENS
            num_computed = num_computed_by(cluster, prefiller) - before
            assert num_reused > num_prompt - length - NUM_OUTPUT_TOKENS, (
                "more than the prompt before: its answer as well"
            )
            assert generated.cached_tokens == num_reused
            receipt = talk.receipt()
            assert receipt["cached_tokens"] == num_reused
            assert receipt["fallbacks"] == []
            if not is_pair:
                assert receipt["fetch"] is None
                assert num_computed == num_prompt - num_reused
            elif fetch is ALWAYS:
                assert num_computed == num_prompt - num_reused
                assert (receipt["fetch"]["from"], receipt["fetch"]["path"]) == ("decode-1", transport)
                assert receipt["fetch"]["blocks"] + receipt["fetch"]["blocks_skipped"] == num_reused // 16
                assert receipt["fetch"]["blocks"] > 0
                assert receipt["fetch"]["error"] is None
            else:
                # What decode made is computed again here; but it is not sent again, and so it was of use.
                assert receipt["fetch"] is None
                assert num_computed > num_prompt - num_reused
                assert receipt["transfer"]["blocks_skipped"] == num_reused // 16
        if is_pair and fetch is ALWAYS:
            prompt = talk.said[:-NUM_OUTPUT_TOKENS]
            fetched = await cluster.block_bytes("prefill", prompt)
            assert len(fetched) == len(prompt) // 16
            assert await cluster.block_bytes("decode", prompt) == fetched
        await cluster.assert_clean()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
async def test_other_families_fetch_their_blocks_too(
    family: str, get_subject: Callable[[str], Subject], key_file: Path
) -> None:
    subject = get_subject(family)
    async with run_cluster(subject.loaded, key_file, fetch=ALWAYS) as cluster:
        talk = Conversation(cluster, subject, make_prompt(40, seed=1), "decode-1")
        await talk.turn()
        num_reused = talk.num_computed // 16 * 16
        assert (await talk.turn(make_prompt(20, seed=2))).cached_tokens == num_reused
        assert talk.receipt()["fetch"]["error"] is None
        await cluster.assert_clean()


async def test_several_conversations_at_once_with_seeds_and_salts_keep_apart(subject: Subject, key_file: Path) -> None:
    """Nothing that was fetched for one is found by another with another salt, and draws are the same with and without."""
    answers: dict[FetchMode, list[list[int]]] = {}
    for fetch in (ALWAYS, OFF):
        async with run_cluster(subject.loaded, key_file, fetch=fetch, num_decode=2) as cluster:
            options = [{"temperature": 0.9, "seed": seed, "cache_salt": f"tenant-{seed}"} for seed in range(4)]

            async def talk(number: int, cluster: Cluster = cluster, options: Any = options) -> list[int]:
                prompt = make_prompt(50, seed=9)
                first = await cluster.generate(prompt, ignore_eos=True, **options[number])
                following = (*prompt, *first.token_ids, *make_prompt(30, seed=number))
                second = await cluster.generate(following, ignore_eos=True, **options[number])
                return [*first.token_ids, *second.token_ids]

            answers[fetch.mode] = list(await asyncio.gather(*(talk(number) for number in range(4))))
            await cluster.assert_clean()
    assert answers[FetchMode.ALWAYS] == answers[FetchMode.OFF]


async def test_a_decode_worker_that_prefills_fetches_from_the_one_that_ran_the_turn_before(
    subject: Subject, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_cluster(subject.loaded, key_file, num_decode=2, placement=Placement.LOCAL, fetch=ALWAYS) as cluster:
        talk = Conversation(cluster, subject, make_prompt(40, seed=1), "")
        first = await cluster.generate(talk.said, ignore_eos=True)
        talk.said = (*talk.said, *first.token_ids)
        talk.last = first
        talk.worker_id = holder = talk.receipt()["decision"]["decode"]
        await eventually(
            lambda: talk.num_announced == talk.num_computed // 16, what="the announcement of the blocks", timeout_s=30.0
        )
        num_reused = talk.num_computed // 16 * 16
        fleet = cluster.registry.fleet  # the holder looks full, so that the other one is chosen
        views = fleet.views
        monkeypatch.setattr(
            fleet,
            "views",
            lambda: [replace(view, running=10**6) if view.worker_id == holder else view for view in views()],
        )
        talk.worker_id = next(
            view.worker_id for view in views() if view.role is Role.DECODE and view.worker_id != holder
        )
        generated = await talk.turn(make_prompt(9, seed=6))
        receipt = talk.receipt()
        assert (receipt["decision"]["mode"], receipt["decision"]["decode"]) == ("local", talk.worker_id)
        assert generated.cached_tokens == num_reused
        assert receipt["fetch"]["from"] == holder
        assert receipt["fetch"]["error"] is None
        await cluster.assert_clean()


async def test_blocks_evicted_between_decision_and_fetch_are_computed(
    subject: Subject, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_cluster(subject.loaded, key_file, fetch=ALWAYS) as cluster:
        talk = Conversation(cluster, subject, make_prompt(40, seed=1), "decode-1")
        await talk.turn()
        names = talk.namer.names(list(talk.said), 16)
        before = cluster.prefix_index.matches(names)
        monkeypatch.setattr(cluster.prefix_index, "matches", lambda names: before)  # the news is late
        await host_of(cluster, "decode-1").worker.steps.call(lambda scheduler: scheduler.pool.clear_cache())
        generated = await cluster.generate((*talk.said, 7, 8, 9), ignore_eos=True)
        assert generated.token_ids == expected_tokens(subject, (*talk.said, 7, 8, 9))
        receipt: Any = cluster.receipts.get(generated.receipt_id)
        assert receipt["fallbacks"] == ["fetch_failed"]
        assert receipt["fetch"]["error"] == "evicted"
        assert receipt["retries"] == 0
        assert generated.cached_tokens == 32  # what the prefill worker itself has of the first turn
        await cluster.assert_clean()


async def test_a_holder_that_stops_answering_is_not_waited_for_long(
    subject: Subject, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_cluster(subject.loaded, key_file, fetch=IMPATIENT) as cluster:
        talk = Conversation(cluster, subject, make_prompt(40, seed=1), "decode-1")
        await talk.turn()
        asked = asyncio.Event()

        async def never(*arguments: Any) -> Any:
            asked.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(host_of(cluster, "decode-1").worker.fetcher, "pin", never)
        await talk.turn(make_prompt(5, seed=2))
        assert asked.is_set()
        receipt = talk.receipt()
        assert receipt["fallbacks"] == ["fetch_failed"]
        assert receipt["fetch"]["error"] == "expired"
        assert receipt["retries"] == 0
        # And the next one does not wait at all.
        await talk.turn(make_prompt(5, seed=3))
        assert talk.receipt()["fetch"] is None
        assert talk.receipt()["fallbacks"] == []
        await cluster.assert_clean()


@pytest.mark.parametrize("victim", ["holder", "requester"])
async def test_either_side_may_go_away_while_blocks_come(
    victim: str, subject: Subject, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request goes on with the same tokens, and the one that is left holds nothing for the one that is gone."""
    async with run_cluster(
        subject.loaded, key_file, num_prefill=2, num_decode=2, fetch=ALWAYS, keep_stopped=True
    ) as cluster:
        talk = Conversation(cluster, subject, make_prompt(40, seed=1), "")
        first = await cluster.generate(talk.said, ignore_eos=True)
        talk.said, talk.last = (*talk.said, *first.token_ids), first
        talk.worker_id = holder = talk.receipt()["decision"]["decode"]
        await eventually(
            lambda: talk.num_announced == talk.num_computed // 16, what="the announcement of the blocks", timeout_s=30.0
        )
        stopping: list[asyncio.Task[None]] = []

        def stop(worker_id: str) -> None:
            host = host_of(cluster, worker_id)
            cluster.hosts.remove(host)
            stopping.append(asyncio.create_task(host.stop()))

        for host in [host for host in cluster.hosts if host.settings.role == "prefill"]:
            fetcher = host.worker.fetcher

            async def reserve(*arguments: Any, fetcher: Any = fetcher, own_id: str = host.identity.worker_id) -> Any:
                slots = await type(fetcher).reserve(fetcher, *arguments)
                if not stopping:
                    stop(holder if victim == "holder" else own_id)
                    await asyncio.sleep(0)
                return slots

            monkeypatch.setattr(fetcher, "reserve", reserve)
        prompt = (*talk.said, *make_prompt(20, seed=2))
        generated = await cluster.generate(prompt, ignore_eos=True)
        assert generated.token_ids == expected_tokens(subject, prompt)
        assert generated.indices == list(range(NUM_OUTPUT_TOKENS))
        assert len(stopping) == 1
        await stopping[0]
        await cluster.assert_clean()
