"""One worker asks another for blocks, and gets them as it gets any: granted, verified, and released once on either side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers.kv_agents import LAYOUT, Node, Prompt, each_transport, hand_over, open_handoff, running
from helpers.waiting import eventually

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.kvtransfer import wire
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.fetch import NO_TOKEN, Fetch
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.layout import Compatibility

pytestmark = pytest.mark.usefixtures("where_bytes_are_moved")

KEY = HandoffKey("req", 1)


@dataclass
class Holder:
    """Plays the worker that has blocks: ``here`` maps names to them."""

    here: dict[bytes, int] = field(default_factory=dict)
    refuse: TransferError | None = None
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    pinned: list[HandoffId] = field(default_factory=list)
    unpinned: list[HandoffId] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_answer.set()

    async def pin(self, handoff: HandoffId, block_names: Sequence[bytes]) -> Sequence[int]:
        if self.refuse is not None:
            raise self.refuse
        found = []
        for name in block_names:
            if name not in self.here:
                break
            found.append(self.here[name])
        if found:
            self.pinned.append(handoff)
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.unpin(handoff)
            raise
        return found

    def unpin(self, handoff: HandoffId) -> None:
        self.unpinned.append(handoff)


@asynccontextmanager
async def holder_and_asker(
    transport: str = "tcp", names: Sequence[bytes] = (), **asker_options: Any
) -> AsyncIterator[tuple[Node, Holder, Node]]:
    """A worker that holds ``names`` in its blocks 5, 6, ..., and one that wants some."""
    holder = Holder({name: 5 + index for index, name in enumerate(names)})
    async with (
        running("decode-0", transports=transport, holder=holder) as giving,
        running("prefill-0", transports=transport, **asker_options) as asking,
    ):
        giving.fill(1)
        asking.fill(2)
        yield giving, holder, asking


def names_of(count: int) -> list[bytes]:
    return [bytes([1 + index]) * 16 for index in range(count)]


async def ask(
    asking: Node, giving: Node, names: Sequence[bytes], *, key: HandoffKey = KEY, wait_s: float = 30.0
) -> int:
    deadline_s = asyncio.get_running_loop().time() + wait_s
    return await asking.agent.fetch(key, giving.identity, giving.address, asking.address, names, deadline_s)


@each_transport
async def test_blocks_that_were_asked_for_come_byte_for_byte_and_without_a_first_token(transport: str) -> None:
    names = names_of(6)
    async with holder_and_asker(transport, names) as (giving, holder, asking):
        assert await ask(asking, giving, names) == 6
        await eventually(lambda: KEY in asking.host.commits)
        first_token, report = asking.host.commits[KEY]
        assert first_token == NO_TOKEN
        assert (report.transport, report.num_blocks, report.num_blocks_skipped) == (transport, 6, 0)
        for slot in asking.host.slots[KEY]:
            assert asking.block(slot.block_id) == giving.block(5 + slot.index)
        handoff = HandoffId(KEY, giving.identity, asking.identity)
        await eventually(lambda: holder.unpinned == [handoff])
        assert holder.pinned == [handoff]
        assert asking.host.releases == []


async def test_only_the_leading_run_that_is_there_comes_and_only_what_the_asker_lacks() -> None:
    names = names_of(6)
    async with holder_and_asker("tcp", names[:4]) as (giving, holder, asking):
        asking.host.already_here = {names[0], names[2]}
        assert await ask(asking, giving, names) == 4
        await eventually(lambda: KEY in asking.host.commits)
        assert [slot.index for slot in asking.host.slots[KEY]] == [1, 3]
        assert asking.host.commits[KEY][1].num_blocks_skipped == 2
        await eventually(lambda: len(holder.unpinned) == 1)


async def test_what_was_evicted_meanwhile_is_said_at_once() -> None:
    async with holder_and_asker("tcp", ()) as (giving, holder, asking):
        with pytest.raises(TransferError) as failure:
            await ask(asking, giving, names_of(3))
        assert failure.value.code is TransferCode.EVICTED
        assert holder.pinned == holder.unpinned == []
        assert asking.host.slots == {}


@pytest.mark.parametrize("code", [TransferCode.DRAINING, TransferCode.NO_CAPACITY])
async def test_the_holders_refusal_reaches_the_asker(code: TransferCode) -> None:
    async with holder_and_asker("tcp", names_of(2)) as (giving, holder, asking):
        holder.refuse = TransferError(code, "not now")
        with pytest.raises(TransferError) as failure:
            await ask(asking, giving, names_of(2))
        assert (failure.value.code, failure.value.message) == (code, "not now")


async def test_a_worker_without_a_holder_gives_nothing() -> None:
    async with running("decode-0") as giving, running("prefill-0") as asking:
        with pytest.raises(TransferError) as failure:
            await ask(asking, giving, names_of(1))
        assert failure.value.code is TransferCode.DRAINING


async def test_names_that_cannot_be_are_refused() -> None:
    async with holder_and_asker("tcp", names_of(2)) as (giving, holder, asking):
        for names in ([], [b"short"], [bytes(16)] * 33):
            with pytest.raises(TransferError) as failure:
                await ask(asking, giving, names)
            assert failure.value.code is TransferCode.PROTOCOL
        assert holder.pinned == []


async def test_what_was_meant_for_the_process_before_is_refused() -> None:
    async with holder_and_asker("tcp", names_of(2)) as (giving, holder, asking):
        before = WorkerIdentity(giving.identity.worker_id, "0" * 32)
        deadline_s = asyncio.get_running_loop().time() + 30.0
        with pytest.raises(TransferError) as failure:
            await asking.agent.fetch(KEY, before, giving.address, asking.address, names_of(2), deadline_s)
        assert failure.value.code is TransferCode.STALE
        assert giving.agent.stats().fenced == 1
        assert holder.pinned == []
        assert await ask(asking, giving, names_of(2)) == 2


async def test_blocks_that_are_not_blocks_here_are_told_before_any_is_pinned() -> None:
    other = Compatibility("another model", LAYOUT)
    async with holder_and_asker("tcp", names_of(2), compatibility=other) as (giving, holder, asking):
        with pytest.raises(TransferError) as failure:
            await ask(asking, giving, names_of(2))
        assert failure.value.code is TransferCode.INCOMPATIBLE
        assert holder.pinned == []


async def test_a_holder_that_cannot_reach_the_asker_says_so_and_pins_nothing() -> None:
    async with holder_and_asker("tcp", names_of(2)) as (giving, holder, asking):
        deadline_s = asyncio.get_running_loop().time() + 30.0
        with pytest.raises(TransferError) as failure:
            await asking.agent.fetch(KEY, giving.identity, giving.address, "127.0.0.1:1", names_of(2), deadline_s)
        assert failure.value.code is TransferCode.PEER_LOST
        assert holder.pinned == []


async def test_what_a_holder_refuses_ends_no_other_question_to_it() -> None:
    names = names_of(2)
    async with holder_and_asker("tcp", names) as (giving, holder, asking):
        holder.may_answer.clear()
        waiting = asyncio.ensure_future(ask(asking, giving, names))
        await eventually(lambda: len(holder.pinned) == 1)
        holder.refuse = TransferError(TransferCode.PEER_LOST, "no transport to you works")
        with pytest.raises(TransferError, match="no transport to you works"):
            await ask(asking, giving, names, key=HandoffKey("other", 1))
        holder.may_answer.set()
        assert await waiting == 2
        await eventually(lambda: KEY in asking.host.commits)


async def test_a_holder_that_is_gone_is_told_at_once_and_a_new_one_is_reached() -> None:
    names = names_of(2)
    async with running("prefill-0") as asking:
        async with running("decode-0", holder=Holder(dict.fromkeys(names, 1))) as giving:
            assert await ask(asking, giving, names) == 2
            await eventually(lambda: KEY in asking.host.commits)
        with pytest.raises(TransferError) as failure:
            await ask(asking, giving, names, key=HandoffKey("second", 1))
        assert failure.value.code is TransferCode.PEER_LOST
        async with running(
            "decode-0", incarnation="2" * 32, address=giving.address, holder=Holder(dict.fromkeys(names, 3))
        ) as again:
            assert await ask(asking, again, names, key=HandoffKey("third", 1)) == 2
            await eventually(lambda: HandoffKey("third", 1) in asking.host.commits)


async def test_an_asker_that_gives_up_gets_its_slots_back_and_the_pins_return() -> None:
    async with holder_and_asker("tcp", names_of(3)) as (giving, holder, asking):
        asking.host.room.clear()
        assert await ask(asking, giving, names_of(3)) == 3
        await eventually(lambda: asking.agent.stats().num_receiving == 1)
        asking.agent.forget(KEY)
        await eventually(lambda: asking.host.cancelled == [KEY])
        await eventually(lambda: len(holder.unpinned) == 1)
        assert KEY not in asking.host.commits


async def test_an_asker_that_leaves_while_the_holder_looks_leaves_nothing_pinned() -> None:
    async with holder_and_asker("tcp", names_of(3)) as (giving, holder, asking):
        holder.may_answer.clear()
        asking_task = asyncio.ensure_future(ask(asking, giving, names_of(3)))
        await eventually(lambda: len(holder.pinned) == 1)
        asking_task.cancel()
        await asyncio.gather(asking_task, return_exceptions=True)
        await eventually(lambda: len(holder.unpinned) == 1)
        assert giving.agent.stats().num_sending == 0


async def test_a_holder_that_closes_while_it_looks_gives_nothing_and_unpins() -> None:
    async with holder_and_asker("tcp", names_of(3)) as (giving, holder, asking):
        holder.may_answer.clear()
        asking_task = asyncio.ensure_future(ask(asking, giving, names_of(3)))
        await eventually(lambda: len(holder.pinned) == 1)
        await giving.agent._desk.close()  # the first thing that closing does
        holder.may_answer.set()
        with pytest.raises(TransferError) as failure:
            await asking_task
        assert failure.value.code is TransferCode.DRAINING
        assert len(holder.unpinned) == 1


async def test_an_asker_that_dies_while_blocks_come_does_not_keep_them_pinned() -> None:
    names = names_of(3)
    holder = Holder({name: 5 + index for index, name in enumerate(names)})
    async with running("decode-0", holder=holder) as giving:
        async with running("prefill-0") as asking:
            asking.host.room.clear()
            assert await ask(asking, giving, names) == 3
            await eventually(lambda: giving.agent.stats().num_sending == 1)
        await eventually(lambda: len(holder.unpinned) == 1)
        assert giving.agent.stats().num_sending == 0


async def test_the_same_request_is_fetched_for_and_handed_over_at_once_both_ways() -> None:
    """The decode worker gives the last turn's blocks and gets this turn's, under one request id and attempt."""
    names = names_of(3)
    async with holder_and_asker("tcp", names) as (giving, holder, asking):
        prompt = Prompt([1, 2], request_id=KEY.request_id, attempt=KEY.attempt)
        handoff = open_handoff(asking, giving, prompt)
        assert await ask(asking, giving, names) == 3
        await eventually(lambda: KEY in asking.host.commits)
        await handoff.abort("enough")
        await eventually(lambda: len(holder.unpinned) == 1)
        await hand_over(asking, giving, Prompt([1, 2], request_id="after"))


def test_a_fetch_crosses_the_wire_and_nonsense_is_named() -> None:
    handoff = HandoffId(KEY, WorkerIdentity("decode-0", "1" * 32), WorkerIdentity("prefill-0", "2" * 32))
    fetch = Fetch(handoff, "127.0.0.1:5", tuple(names_of(2)), 1.5)
    message = wire.fetch_to_wire(fetch)
    assert wire.fetch_from_wire(message) == fetch
    for change, field_name in (({"time_left_ms": 0}, "time_left_ms"), ({"receiver_address": ""}, "receiver_address")):
        bad = pb.FetchRequest()
        bad.CopyFrom(message)
        for name, value in change.items():
            setattr(bad, name, value)
        with pytest.raises(ValueError, match=field_name):
            wire.fetch_from_wire(bad)
    for num_blocks in (0, 3):
        with pytest.raises(ValueError, match="num_blocks"):
            wire.fetch_answer_from_wire(pb.FetchResponse(num_blocks=num_blocks), fetch)
    assert wire.fetch_answer_from_wire(pb.FetchResponse(num_blocks=2), fetch) == 2


def test_a_fetch_whose_time_is_over_still_says_at_least_a_millisecond() -> None:
    handoff = HandoffId(KEY, WorkerIdentity("a", "1"), WorkerIdentity("b", "2"))
    assert wire.fetch_to_wire(Fetch(handoff, "h:1", (bytes(16),), -1.0)).time_left_ms == 1
    assert wire.fetch_to_wire(Fetch(handoff, "h:1", (bytes(16),), 1e12)).time_left_ms == (1 << 32) - 1
