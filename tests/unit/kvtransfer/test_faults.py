"""Links that break, spoil and stall; workers that die, are replaced, or come back too late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from helpers.fault_proxy import Fault, FaultProxy, fault_proxy
from helpers.kv_agents import (
    FIRST_TOKEN,
    LAYOUT,
    Node,
    Prompt,
    assert_arrived,
    hand_over,
    open_handoff,
    options,
    running,
)
from helpers.kv_raw_peer import RawPeer, raw_peer
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.messages import LeaseExpired, Reserve
from baton.kvtransfer.transport import frames

BLOCK = LAYOUT.block_bytes
HELLO = frames.HEADER_BYTES
PROMPT_BLOCKS = [4, 9, 2]
# One frame: header, three entries, three blocks.
FRAME = frames.HEADER_BYTES + 3 * 32 + 3 * BLOCK


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def through_proxy(**agent_options: Any) -> AsyncIterator[tuple[Node, Node, FaultProxy]]:
    """A sender whose data connection to the receiver goes through a proxy."""
    agent_options.setdefault("options", options(stall_s=0.3))
    async with (
        fault_proxy() as proxy,
        running("prefill-0", transports="tcp", **agent_options) as sender,
        running("decode-0", transports="tcp", advertised_port=proxy.port, **agent_options) as receiver,
    ):
        listener = receiver.agent._listener
        assert listener is not None
        proxy.target = ("127.0.0.1", listener.port)
        sender.fill(1)
        receiver.fill(2)
        yield sender, receiver, proxy


async def failed(sender: Node, receiver: Node, prompt: Prompt) -> TransferError:
    with pytest.raises(TransferError) as caught:
        await hand_over(sender, receiver, prompt)
    assert prompt.done == [caught.value]
    await eventually(lambda: receiver.agent.stats().num_receiving == 0)
    await eventually(lambda: sorted(receiver.host.free) == list(range(receiver.memory.num_blocks)))
    assert receiver.host.commits == {}
    return caught.value


CUTS = [
    pytest.param(HELLO + 10, id="in the header"),
    pytest.param(HELLO + frames.HEADER_BYTES + 40, id="in the entries"),
    pytest.param(HELLO + FRAME - 3 * BLOCK, id="before the first block"),
    pytest.param(HELLO + FRAME - BLOCK - 5, id="in the second block"),
    pytest.param(HELLO + FRAME - 1, id="before the last byte"),
]


@pytest.mark.parametrize("cut", CUTS)
async def test_a_link_that_breaks_once_is_made_again_and_what_was_lost_is_sent_again(cut: int) -> None:
    async with through_proxy() as (sender, receiver, proxy):
        proxy.board.set("*", Fault(cut_after_bytes=cut, max_times=1))
        prompt = Prompt(PROMPT_BLOCKS)
        await hand_over(sender, receiver, prompt)
        assert_arrived(sender, receiver, prompt)
        assert proxy.num_connections == 2
        assert receiver.host.releases == []


async def test_a_link_that_keeps_breaking_fails_the_handoff_and_frees_everything() -> None:
    async with through_proxy() as (sender, receiver, proxy):
        proxy.board.set("*", Fault(cut_after_bytes=HELLO + FRAME - 5))
        error = await failed(sender, receiver, Prompt(PROMPT_BLOCKS))
        assert (error.code, error.retryable) == (TransferCode.PEER_LOST, True)
        assert proxy.num_connections == 2
        proxy.board.clear()
        await hand_over(sender, receiver, Prompt(PROMPT_BLOCKS, attempt=2))  # nothing is remembered against the pair


async def test_a_link_that_breaks_between_chunks_costs_nothing() -> None:
    async with through_proxy() as (sender, receiver, proxy):
        one_block = frames.HEADER_BYTES + 32 + BLOCK
        proxy.board.set("*", Fault(cut_after_bytes=HELLO + one_block, max_times=1))
        prompt = Prompt(PROMPT_BLOCKS)
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready({0: prompt.block_ids[0]})
        await eventually(lambda: receiver.agent.stats().bytes_received["tcp"] == BLOCK)
        handoff.blocks_ready({1: prompt.block_ids[1], 2: prompt.block_ids[2]})
        await handoff.commit(FIRST_TOKEN)
        assert_arrived(sender, receiver, prompt)


@pytest.mark.parametrize("offset", [1, BLOCK + 7, 3 * BLOCK])
async def test_a_spoiled_block_is_sent_once_more(offset: int) -> None:
    async with through_proxy() as (sender, receiver, proxy):
        proxy.board.set("*", Fault(flip_at_byte=HELLO + FRAME - offset, max_times=1))
        prompt = Prompt(PROMPT_BLOCKS)
        await hand_over(sender, receiver, prompt)
        assert_arrived(sender, receiver, prompt)
        assert receiver.agent.stats().corrupt_blocks == 1
        assert sender.agent.stats().bytes_sent["tcp"] == 4 * BLOCK


async def test_a_link_that_stalls_is_given_up_and_made_again() -> None:
    async with through_proxy() as (sender, receiver, proxy):
        proxy.board.set("*", Fault(stall_after_bytes=HELLO + FRAME - BLOCK, max_times=1))
        prompt = Prompt(PROMPT_BLOCKS)
        await hand_over(sender, receiver, prompt)
        assert_arrived(sender, receiver, prompt)
        assert proxy.num_connections == 2


@pytest.mark.parametrize("after", [pytest.param(HELLO, id="from the start"), pytest.param(HELLO + FRAME, id="later")])
async def test_a_link_that_swallows_frames_is_noticed_and_made_again(after: int) -> None:
    """Nothing breaks, every frame has left, and none of them arrives."""
    async with through_proxy(options=options(silent_s=0.3, stall_s=3600.0)) as (sender, receiver, proxy):
        proxy.board.set("*", Fault(stall_after_bytes=after, max_times=1))
        for attempt in (1, 2):
            prompt = Prompt(PROMPT_BLOCKS, attempt=attempt)
            await hand_over(sender, receiver, prompt)
            assert_arrived(sender, receiver, prompt)
        assert proxy.num_connections == 2


async def test_a_link_that_goes_on_swallowing_frames_fails_its_handoffs() -> None:
    async with through_proxy(options=options(silent_s=0.3, stall_s=3600.0)) as (sender, receiver, proxy):
        proxy.board.set("*", Fault(stall_after_bytes=HELLO))
        error = await failed(sender, receiver, Prompt(PROMPT_BLOCKS))
        assert error.code is TransferCode.PEER_LOST
        assert "the data connection broke again" in error.message
        proxy.board.clear("*")
        await hand_over(sender, receiver, Prompt(PROMPT_BLOCKS, attempt=2))


async def test_a_slow_link_is_not_taken_for_a_silent_one() -> None:
    """A verdict may take what a frame takes, and a link that was measured to be slow may take longer."""
    slow = options(silent_s=0.2, stall_s=3600.0, min_bytes_per_s=FRAME / 60.0)
    async with through_proxy(options=slow) as (sender, receiver, proxy):
        proxy.board.set("*", Fault(rate_bytes_s=FRAME / 1.5))
        prompt = Prompt(PROMPT_BLOCKS)
        await hand_over(sender, receiver, prompt)
        assert_arrived(sender, receiver, prompt)
        assert proxy.num_connections == 1


async def test_a_data_plane_that_cannot_be_reached_fails_the_handshake_and_names_the_address() -> None:
    async with running("prefill-0", transports="tcp") as sender, running("decode-0", advertised_port=1) as receiver:
        error = await failed(sender, receiver, Prompt([1]))
        assert error.code is TransferCode.PEER_LOST
        assert "data plane 127.0.0.1:1" in error.message


# Leases.


async def test_an_expired_lease_frees_the_slots_and_everything_later_is_refused() -> None:
    clock = Clock()
    async with (
        running("prefill-0", options=options(heartbeat_s=3600.0)) as sender,
        running("decode-0", options=options(heartbeat_s=3600.0), clock=clock) as receiver,
    ):
        prompt = Prompt([1, 2])
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready({0: 1})
        await eventually(lambda: sum(receiver.agent.stats().bytes_received.values()) == BLOCK)
        clock.now += 14.9
        receiver.agent.tick()
        assert receiver.agent.stats().num_receiving == 1
        clock.now += 0.1
        receiver.agent.tick()
        await eventually(lambda: receiver.host.releases == [(prompt.key, TransferCode.EXPIRED, True)])
        error = await handoff.wait()  # told at once, not by its own timer
        assert error is not None
        assert error.code is TransferCode.EXPIRED


async def test_heartbeats_keep_a_lease_for_as_long_as_it_takes() -> None:
    clock = Clock()
    async with (
        running("prefill-0", options=options(heartbeat_s=0.02), clock=clock) as sender,
        running("decode-0", clock=clock) as receiver,
    ):
        prompt = Prompt([1])
        handoff = open_handoff(sender, receiver, prompt)
        await eventually(lambda: handoff.holds_lease)
        (receiving,) = receiver.agent._receiving.active
        for _ in range(10):
            clock.now += 10.0
            receiver.agent.tick()
            sender.agent.tick()
            deadline = clock.now + 15.0
            for machine in (receiving._machine, handoff._machine):
                await eventually(
                    lambda machine=machine, deadline=deadline: machine._timers.get(LeaseExpired) == deadline
                )
        handoff.blocks_ready(prompt.all_ready)
        await handoff.commit(FIRST_TOKEN)


async def test_a_sender_hears_from_the_heartbeat_that_its_handoff_is_gone() -> None:
    """The receiver forgot while no data connection could carry the news."""
    async with through_proxy(options=options(heartbeat_s=0.05)) as (sender, receiver, _):
        prompt = Prompt([1])
        handoff = open_handoff(sender, receiver, prompt)
        await eventually(lambda: handoff.holds_lease)
        (receiving,) = receiver.agent._receiving.active
        for inlet in list(receiving.pair.inlets):
            inlet.close()
        receiver.agent.forget(prompt.key)
        error = await handoff.wait()
        assert error is not None
        assert error.code is TransferCode.UNKNOWN_HANDOFF


async def test_a_sender_that_cannot_renew_gives_up_when_its_lease_ends() -> None:
    clock = Clock()
    async with (
        running("prefill-0", options=options(heartbeat_s=3600.0), clock=clock) as sender,
        running("decode-0", options=options(heartbeat_s=3600.0)) as receiver,
    ):
        prompt = Prompt([1])
        handoff = open_handoff(sender, receiver, prompt)
        await eventually(lambda: handoff.holds_lease)
        clock.now += 15.0
        sender.agent.tick()
        assert [error.code for error in prompt.done if error] == [TransferCode.EXPIRED]
        await eventually(lambda: receiver.host.releases == [(prompt.key, TransferCode.EXPIRED, True)])


# Workers that come and go.


async def test_a_receiver_that_dies_fails_the_handoff_soon() -> None:
    async with running("prefill-0", transports="tcp") as sender, running("decode-0") as receiver:
        prompt = Prompt([1, 2])
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready({0: 1})
        await eventually(lambda: receiver.agent.stats().bytes_received["tcp"] == BLOCK)
        # As a killed process: nothing is said, every socket is closed.
        assert receiver.agent._listener is not None
        receiver.agent._listener.close()
        receiver.agent._listener = None
        await receiver.server.stop(None)
        handoff.blocks_ready({1: 2})
        with pytest.raises(TransferError) as caught:
            await handoff.commit(FIRST_TOKEN)
        assert caught.value.code is TransferCode.PEER_LOST
        assert prompt.done == [caught.value]


async def test_a_new_process_of_the_sender_ends_what_the_old_one_had_and_fences_it() -> None:
    async with running("decode-0") as receiver, raw_peer(receiver, "prefill-0", "old") as old:
        await old.shake_hands()
        handoff = old.handoff()
        grant = await old.reserve(handoff, Prompt([1]).names)
        connection = await old.connect()
        async with raw_peer(receiver, "prefill-0", "new") as new:
            await new.shake_hands()
            await eventually(lambda: receiver.host.releases == [(handoff.key, TransferCode.STALE, True)])
            await connection.until_closed()
            for attempt in (old.commit(handoff, {}, Prompt([1]).names), old.client.reserve(reserve_of(old), 5.0)):
                answer = await attempt
                assert getattr(answer, "code", None) is TransferCode.STALE
            with pytest.raises(TransferError, match="stale"):
                await old.shake_hands()
            assert await (await old.connect()).until_closed() == [frames.FrameKind.CLOSE]
            assert receiver.agent.stats().fenced >= 2
            assert len(grant.slots) == 1


def reserve_of(peer: RawPeer) -> Reserve:
    return Reserve(peer.handoff("another"), tuple(Prompt([1]).names), LAYOUT.block_size, "tcp")


async def test_a_new_process_of_the_receiver_is_paired_with_and_the_old_one_forgotten() -> None:
    async with running("prefill-0") as sender:
        async with running("decode-0", incarnation="old") as old:
            await hand_over(sender, old, Prompt([1]))
        async with running("decode-0", incarnation="new", address=old.address) as new:
            await hand_over(sender, new, Prompt([1], request_id="later"))
            assert list(sender.agent._sending._pairs._pairs) == [new.identity]
            error = await sender.agent.open(Prompt([1], request_id="late").spec(old)).wait()
            assert error is not None
            assert error.code is TransferCode.STALE
            await hand_over(sender, new, Prompt([1], request_id="after"))


async def test_the_memory_of_a_sender_that_died_is_let_go() -> None:
    quick = options(limits={"lease_s": 1.0}, heartbeat_s=0.1)
    async with running("decode-0", options=quick) as receiver:
        async with running("prefill-0", transports="shm", options=quick) as sender:
            await hand_over(sender, receiver, Prompt([1]))
            (pair,) = receiver.agent._receiving._pairs.values()
            assert pair.source is not None
        await eventually(lambda: not receiver.agent._receiving._pairs)
        assert pair.source is None


async def test_a_sender_that_shakes_hands_and_is_never_heard_of_again_is_let_go() -> None:
    async with running("decode-0", options=options(limits={"lease_s": 0.05})) as receiver, raw_peer(receiver) as peer:
        await peer.shake_hands()
        assert len(receiver.agent._receiving._pairs) == 1
        await eventually(lambda: not receiver.agent._receiving._pairs)


async def test_an_idle_pair_stays_while_it_is_connected() -> None:
    quick = options(limits={"lease_s": 1.0}, heartbeat_s=0.1, expect_wait_s=3.0)
    async with running("decode-0", options=quick) as receiver, running("prefill-0", options=quick) as sender:
        await hand_over(sender, receiver, Prompt([1]))
        unannounced = sender.agent.open(Prompt([2], request_id="unannounced").spec(receiver))
        error = await unannounced.wait()  # three leases long
        assert error is not None
        assert error.code is TransferCode.UNKNOWN_HANDOFF  # and not stale
        await hand_over(sender, receiver, Prompt([1], request_id="later"))
