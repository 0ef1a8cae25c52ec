"""How handoffs between two agents end otherwise than by an acknowledgement, and that nothing is left then."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

import pytest
from helpers.kv_agents import (
    COMPATIBILITY,
    FIRST_TOKEN,
    LAYOUT,
    Prompt,
    each_transport,
    failure_of,
    hand_over,
    open_handoff,
    options,
    running,
    two_nodes,
)
from helpers.waiting import eventually

from baton.kvtransfer.errors import LocalProtocolError, TransferCode, TransferError
from baton.kvtransfer.memory import HostBlockMemory

pytestmark = pytest.mark.usefixtures("where_bytes_are_moved")


@each_transport
async def test_the_senders_abort_frees_the_slots_and_the_blocks_once(transport: str) -> None:
    async with two_nodes(transport) as (sender, receiver):
        prompt = Prompt([1, 2, 3])
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready({0: 1, 1: 2})
        await eventually(lambda: receiver.agent.stats().bytes_received[transport] == 2 * sender.memory.block_bytes)
        await handoff.abort("the client left")
        await handoff.abort("again")
        assert [error.code for error in prompt.done if error] == [TransferCode.ABORTED]
        await eventually(lambda: receiver.host.releases == [(prompt.key, TransferCode.ABORTED, True)])
        with pytest.raises(TransferError):
            await handoff.commit(FIRST_TOKEN)
        handoff.blocks_ready({2: 3})
        assert receiver.agent.stats().num_receiving == 0
        assert receiver.host.commits == {}


async def test_the_sender_hears_when_the_receiver_no_longer_wants_it() -> None:
    async with two_nodes(options=options(heartbeat_s=60.0)) as (sender, receiver):
        prompt = Prompt([1, 2])
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready({0: 1})
        await eventually(lambda: receiver.agent.stats().bytes_received["tcp"] > 0)
        receiver.agent.forget(prompt.key)
        error = await handoff.wait()
        assert error is not None
        assert (error.code, error.message) == (TransferCode.ABORTED, "the receiver no longer wants it")
        assert receiver.host.releases == [(prompt.key, TransferCode.ABORTED, True)]


@each_transport
async def test_blocks_are_not_released_while_a_thread_reads_them(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.kvtransfer.transport.outlet._INLINE_BYTES", 0)
    async with two_nodes(transport) as (sender, receiver):
        reading, gate = threading.Event(), threading.Event()
        checksums = sender.memory.rows.checksums

        def gated(rows: list[int]) -> list[int]:
            reading.set()
            assert gate.wait(10)
            return checksums(rows)

        monkeypatch.setattr(sender.memory.rows, "checksums", gated)
        prompt = Prompt([1, 2])
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready(prompt.all_ready)
        await eventually(reading.is_set)
        aborting = asyncio.create_task(handoff.abort("the client left"))
        await eventually(lambda: receiver.host.releases == [(prompt.key, TransferCode.ABORTED, True)])
        assert prompt.done == []
        assert not aborting.done()
        gate.set()
        await aborting
        assert len(prompt.done) == 1
        assert sum(receiver.agent.stats().bytes_received.values()) == 0
        monkeypatch.undo()
        await hand_over(sender, receiver, Prompt([3], request_id="after"))


async def test_giving_up_while_waiting_for_room_stops_the_search_for_it() -> None:
    async with two_nodes() as (sender, receiver):
        receiver.host.room.clear()
        prompt = Prompt([1])
        handoff = open_handoff(sender, receiver, prompt)
        await eventually(lambda: receiver.agent.stats().num_receiving == 1)
        await handoff.abort("the client left")
        await eventually(lambda: receiver.host.cancelled == [prompt.key])
        await eventually(lambda: receiver.agent.stats().num_receiving == 0)
        assert receiver.host.slots == {}


async def test_a_cancelled_commit_gives_the_handoff_up() -> None:
    async with two_nodes() as (sender, receiver):
        receiver.host.room.clear()
        prompt = Prompt([1])
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready(prompt.all_ready)
        committing = asyncio.create_task(handoff.commit(FIRST_TOKEN))
        await eventually(lambda: receiver.agent.stats().num_receiving == 1)
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await committing
        await eventually(lambda: receiver.host.cancelled == [prompt.key])
        assert len(prompt.done) == 1


@pytest.mark.parametrize("code", [TransferCode.NO_CAPACITY, TransferCode.DRAINING])
async def test_the_hosts_refusal_reaches_the_sender(code: TransferCode) -> None:
    async with two_nodes() as (sender, receiver):
        receiver.host.refuse = TransferError(code, "7 blocks free, 9 wanted")
        error = await failure_of(sender, receiver, Prompt([1]))
        assert (error.code, error.message, error.retryable) == (code, "7 blocks free, 9 wanted", True)


async def test_a_host_that_fails_is_a_refusal_without_its_details() -> None:
    async with two_nodes() as (sender, receiver):
        receiver.host.free.clear()  # its reserve raises IndexError
        error = await failure_of(sender, receiver, Prompt([1]))
        assert (error.code, error.message) == (TransferCode.INTERNAL, "the receiver failed to make room")


async def test_a_host_that_gives_slots_that_do_not_fit_gets_them_back() -> None:
    async with two_nodes() as (sender, receiver):
        receiver.host.free = [receiver.memory.num_blocks]
        prompt = Prompt([1])
        assert (await failure_of(sender, receiver, prompt)).code is TransferCode.INTERNAL
        await eventually(lambda: receiver.host.releases == [(prompt.key, TransferCode.INTERNAL, True)])


@each_transport
async def test_a_commit_that_the_host_refuses_releases_the_slots(transport: str) -> None:
    async with two_nodes(transport) as (sender, receiver):
        receiver.host.refuse_commit = TransferError(TransferCode.DRAINING, "leaving")
        prompt = Prompt([1, 2])
        assert (await failure_of(sender, receiver, prompt)).code is TransferCode.DRAINING
        await eventually(lambda: receiver.host.releases == [(prompt.key, TransferCode.DRAINING, True)])


async def test_a_request_that_is_worth_nothing_any_more_ends_on_both_sides() -> None:
    async with two_nodes() as (sender, receiver):
        prompt = Prompt([1, 2])
        loop_s = sender.agent._context.clock()
        handoff = open_handoff(sender, receiver, prompt, deadline_s=loop_s + 0.2)
        error = await handoff.wait()
        assert error is not None
        assert error.code is TransferCode.EXPIRED
        await eventually(lambda: receiver.agent.stats().num_receiving == 0)


async def test_the_same_attempt_cannot_be_opened_twice_at_once() -> None:
    async with two_nodes() as (sender, receiver):
        handoff = open_handoff(sender, receiver, Prompt([1]))
        with pytest.raises(ValueError, match="already under way"):
            sender.agent.open(Prompt([1]).spec(receiver))
        await handoff.abort("enough")


async def test_mistakes_of_the_host_raise_and_change_nothing() -> None:
    async with two_nodes() as (sender, receiver):
        prompt = Prompt([1, 2])
        handoff = open_handoff(sender, receiver, prompt)
        with pytest.raises(LocalProtocolError):
            handoff.blocks_ready({2: 1})
        with pytest.raises(LocalProtocolError):
            await handoff.commit(FIRST_TOKEN)
        handoff.blocks_ready(prompt.all_ready)
        await handoff.commit(FIRST_TOKEN)


async def test_blocks_of_another_size_than_the_layout_says_are_a_mistake() -> None:
    memory = HostBlockMemory(2, LAYOUT.block_bytes + 1)
    with pytest.raises(ValueError, match="bytes"):
        async with running("prefill-0", memory=memory, compatibility=COMPATIBILITY):
            pass
    memory.close()


async def test_listening_everywhere_needs_an_address_to_tell() -> None:
    with pytest.raises(ValueError, match="every address"):
        async with running("prefill-0", data_host="0.0.0.0"):
            pass
    async with running("prefill-0", data_host="0.0.0.0", advertised_host="127.0.0.1", advertised_port=7) as node:
        assert node.agent.data_address == "127.0.0.1:7"


@each_transport
async def test_a_receiver_that_closes_tells_its_senders_and_releases_everything(transport: str) -> None:
    prompt = Prompt([1, 2])
    async with running("prefill-0", transports=transport) as sender:
        async with running("decode-0", transports=transport) as receiver:
            handoff = open_handoff(sender, receiver, prompt)
            handoff.blocks_ready({0: 1})
            await eventually(lambda: receiver.agent.stats().bytes_received[transport] > 0)
        assert receiver.host.releases == [(prompt.key, TransferCode.DRAINING, True)]
        error = await handoff.wait()
        assert error is not None
        assert error.code is TransferCode.DRAINING


@each_transport
async def test_a_sender_that_closes_tells_its_receivers_and_releases_everything(transport: str) -> None:
    prompt = Prompt([1, 2])
    async with running("decode-0", transports=transport) as receiver:
        async with running("prefill-0", transports=transport) as sender:
            handoff = open_handoff(sender, receiver, prompt)
            handoff.blocks_ready({0: 1})
            await eventually(lambda: receiver.agent.stats().bytes_received[transport] > 0)
        assert [error.code for error in prompt.done if error] == [TransferCode.DRAINING]
        assert receiver.host.releases == [(prompt.key, TransferCode.DRAINING, True)]


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@each_transport
async def test_nothing_stays_open(transport: str) -> None:
    async def once() -> None:
        async with two_nodes(transport) as (sender, receiver):
            await hand_over(sender, receiver, Prompt([1, 2]))
            handoff = open_handoff(sender, receiver, Prompt([3], request_id="aborted"))
            await handoff.abort("enough")

    await once()  # what gRPC opens once and keeps
    before = descriptors()
    for _ in range(3):
        await once()
    await eventually(lambda: descriptors() <= before, what="as few descriptors as before")
    assert "baton-kv" not in Path("/proc/self/maps").read_text()
