"""Two agents in one process, over real sockets and a real gRPC server, with each transport."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from helpers.kv_agents import (
    FIRST_TOKEN,
    LAYOUT,
    Prompt,
    assert_arrived,
    each_transport,
    failure_of,
    hand_over,
    open_handoff,
    options,
    running,
    two_nodes,
)
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.layout import Compatibility
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.versions import VersionRange

pytestmark = pytest.mark.usefixtures("where_bytes_are_moved")


@each_transport
async def test_blocks_arrive_byte_for_byte_and_both_sides_report_the_same(transport: str) -> None:
    async with two_nodes(transport) as (sender, receiver):
        prompt = Prompt([3, 1, 8, 30, 31, 0])
        report = await hand_over(sender, receiver, prompt)
        assert_arrived(sender, receiver, prompt)
        first_token, received = receiver.host.commits[prompt.key]
        assert first_token == FIRST_TOKEN
        assert (report.transport, report.num_blocks, report.num_blocks_skipped) == (transport, 6, 0)
        assert report.num_bytes == received.num_bytes == 6 * sender.memory.block_bytes
        assert prompt.done == [None]
        assert sender.agent.stats().bytes_sent == receiver.agent.stats().bytes_received == {transport: report.num_bytes}
        assert receiver.host.releases == []


@each_transport
async def test_only_granted_slots_are_written(transport: str) -> None:
    async with two_nodes(transport) as (sender, receiver):
        before = receiver.contents()
        prompt = Prompt([5, 6, 7])
        await hand_over(sender, receiver, prompt)
        written = {slot.block_id for slot in receiver.host.slots[prompt.key]}
        for block_id, content in enumerate(receiver.contents()):
            assert (content == before[block_id]) is (block_id not in written)


@each_transport
async def test_blocks_of_a_chunk_arrive_while_the_next_is_computed(transport: str) -> None:
    async with two_nodes(transport) as (sender, receiver):
        prompt = Prompt([0, 1, 2, 3])
        handoff = open_handoff(sender, receiver, prompt)
        received = receiver.agent.stats().bytes_received
        for chunk in ({0: 0, 1: 1}, {2: 2}, {3: 3}):
            expected = received[transport] + len(chunk) * sender.memory.block_bytes
            handoff.blocks_ready(chunk)
            await eventually(lambda expected=expected: received[transport] == expected, what="the chunk")
        assert receiver.host.commits == {}
        await handoff.commit(FIRST_TOKEN)
        assert_arrived(sender, receiver, prompt)


@each_transport
async def test_what_the_receiver_has_is_not_sent(transport: str) -> None:
    async with two_nodes(transport) as (sender, receiver):
        prompt = Prompt([4, 5, 6])
        receiver.host.already_here = set(prompt.names[:2])
        report = await hand_over(sender, receiver, prompt)
        assert (report.num_blocks, report.num_blocks_skipped) == (1, 2)
        assert receiver.agent.stats().bytes_received[transport] == sender.memory.block_bytes
        everything = Prompt([4, 5], request_id="all-there")
        assert (await hand_over(sender, receiver, everything)).num_blocks == 0


async def test_a_reservation_waits_for_room_while_the_prompt_is_computed() -> None:
    async with two_nodes() as (sender, receiver):
        receiver.host.room.clear()
        prompt = Prompt([1, 2])
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready(prompt.all_ready)
        committing = asyncio.create_task(handoff.commit(FIRST_TOKEN))
        await eventually(lambda: receiver.agent.stats().num_receiving == 1)
        assert not committing.done()
        receiver.host.room.set()
        await committing
        assert_arrived(sender, receiver, prompt)


@each_transport
async def test_many_handoffs_at_once(transport: str) -> None:
    async with two_nodes(transport, num_blocks=120) as (sender, receiver):
        prompts = [Prompt([(7 * i + j) % 120 for j in range(1 + i % 6)], request_id=f"r{i}") for i in range(30)]
        await asyncio.gather(*(hand_over(sender, receiver, prompt) for prompt in prompts))
        for prompt in prompts:
            assert_arrived(sender, receiver, prompt)
        assert receiver.agent.stats().num_receiving == sender.agent.stats().num_sending == 0
        assert receiver.agent.stats().handoffs_received == sender.agent.stats().handoffs_sent == 30


async def test_both_directions_at_once() -> None:
    async with two_nodes("shm") as (one, two):
        there, back = Prompt([1, 2, 3], request_id="there"), Prompt([9, 8, 7], request_id="back")
        one.host.free, two.host.free = [20, 21, 22], [23, 24, 25]
        await asyncio.gather(hand_over(one, two, there), hand_over(two, one, back))
        assert_arrived(one, two, there)
        assert_arrived(two, one, back)


# Who may hand over what.


async def test_a_reservation_that_comes_before_its_announcement_waits_for_it() -> None:
    async with two_nodes() as (sender, receiver):
        prompt = Prompt([1])
        handoff = sender.agent.open(prompt.spec(receiver))
        handoff.blocks_ready(prompt.all_ready)
        committing = asyncio.create_task(handoff.commit(FIRST_TOKEN))
        await eventually(lambda: receiver.agent._receiving._expectations._num_waiting == 1)
        receiver.agent.expect(prompt.key, sender.identity)
        await committing


async def test_a_handoff_that_nobody_announced_is_refused() -> None:
    async with two_nodes(options=options(expect_wait_s=0.05)) as (sender, receiver):
        handoff = sender.agent.open(Prompt([1]).spec(receiver))
        error = await handoff.wait()
        assert error is not None
        assert error.code is TransferCode.UNKNOWN_HANDOFF
        assert receiver.host.slots == {}


async def test_another_sender_than_the_announced_one_is_stale() -> None:
    async with two_nodes() as (sender, receiver):
        prompt = Prompt([1])
        receiver.agent.expect(prompt.key, WorkerIdentity(sender.identity.worker_id, "other"))
        error = await sender.agent.open(prompt.spec(receiver)).wait()
        assert error is not None
        assert error.code is TransferCode.STALE
        assert receiver.agent.stats().fenced == 1


async def test_an_older_attempt_is_stale_at_once() -> None:
    async with two_nodes() as (sender, receiver):
        receiver.agent.expect(HandoffKey("req", 2), sender.identity)
        error = await sender.agent.open(Prompt([1], attempt=1).spec(receiver)).wait()
        assert error is not None
        assert error.code is TransferCode.STALE


async def test_a_handoff_that_the_receiver_forgot_is_refused_at_once() -> None:
    async with two_nodes() as (sender, receiver):
        prompt = Prompt([1])
        receiver.agent.forget(prompt.key)
        error = await sender.agent.open(prompt.spec(receiver)).wait()
        assert error is not None
        assert error.code is TransferCode.ABORTED


async def test_a_message_for_another_incarnation_is_stale() -> None:
    async with two_nodes() as (sender, receiver):
        wrong = dataclasses.replace(receiver.identity, incarnation="other")
        spec = dataclasses.replace(Prompt([1]).spec(receiver), receiver=wrong)
        error = await sender.agent.open(spec).wait()
        assert error is not None
        assert error.code is TransferCode.STALE
        assert str(receiver.identity) in error.message


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Compatibility("another model", LAYOUT), "model fingerprint: 'model' here, 'another model' there"),
        (
            Compatibility("model", LAYOUT, VersionRange(3, 4)),
            "wire version: decode-0/11111111 speaks 1 to 2, prefill-0/11111111 speaks 3 to 4: upgrade decode-0",
        ),
        (
            Compatibility("model", dataclasses.replace(LAYOUT, num_layers=3, dtype="bfloat16")),
            "KV num_layers: 2 here, 3 there; KV dtype: 'float32' here, 'bfloat16' there",
        ),
    ],
)
async def test_incompatible_workers_never_pair_and_both_values_are_named(other: Compatibility, expected: str) -> None:
    async with running("prefill-0", compatibility=other) as sender, running("decode-0") as receiver:
        prompt = Prompt([1])
        error = await failure_of(sender, receiver, prompt)
        assert (error.code, error.message, error.retryable) == (TransferCode.INCOMPATIBLE, expected, False)
        assert receiver.host.slots == {}


async def test_a_failed_handshake_is_not_remembered() -> None:
    async with running("prefill-0") as sender:
        async with running("decode-0") as receiver:
            address = receiver.address
        gone = Prompt([1]).spec(receiver)
        error = await sender.agent.open(gone).wait()
        assert error is not None
        assert error.code is TransferCode.PEER_LOST
        async with running("decode-0", address=address) as receiver:
            await hand_over(sender, receiver, Prompt([1], request_id="later"))


# Which way the bytes go.


async def test_auto_takes_the_shortest_way_that_works() -> None:
    async with two_nodes("auto") as (sender, receiver):
        assert sender.agent.transport_names == ("inproc", "shm", "tcp")
        assert (await hand_over(sender, receiver, Prompt([1]))).transport == "inproc"


async def test_shared_memory_is_next_on_one_host() -> None:
    async with running("prefill-0") as sender, running("decode-0", transports=("shm", "tcp")) as receiver:
        assert (await hand_over(sender, receiver, Prompt([1]))).transport == "shm"


async def test_auto_falls_back_to_tcp_when_the_memory_is_not_what_was_announced() -> None:
    memory = HostBlockMemory(8, LAYOUT.block_bytes)
    assert memory.shared is not None
    memory.shared = dataclasses.replace(memory.shared, nonce=bytes(16))
    elsewhere = ("shm", "tcp")
    async with (
        running("prefill-0", memory=memory, transports=elsewhere) as sender,
        running("decode-0", transports=elsewhere) as receiver,
    ):
        assert (await hand_over(sender, receiver, Prompt([1]))).transport == "tcp"


async def test_an_explicit_transport_is_honoured_or_refused_with_the_reason() -> None:
    memory = HostBlockMemory(8, LAYOUT.block_bytes)
    assert memory.shared is not None
    memory.shared = dataclasses.replace(memory.shared, nonce=bytes(16))
    async with running("prefill-0", memory=memory, transports="shm") as sender, running("decode-0") as receiver:
        error = await failure_of(sender, receiver, Prompt([1]))
        assert error.code is TransferCode.INCOMPATIBLE
        assert "no common transport: shm there, inproc, shm, tcp here; shared memory: /proc/" in error.message
    async with running("prefill-0", transports="shm") as sender, running("decode-0", transports="tcp") as receiver:
        error = await failure_of(sender, receiver, Prompt([1]))
        assert error.message == "no common transport: shm there, tcp here"
    async with running("prefill-0", transports="tcp") as sender, running("decode-0") as receiver:
        assert (await hand_over(sender, receiver, Prompt([1]))).transport == "tcp"


async def test_an_unknown_transport_is_refused_at_start() -> None:
    with pytest.raises(TransferError, match="'carrier-pigeon' is not one of auto, inproc, cuda_ipc, shm, nixl, tcp"):
        async with running("prefill-0", transports="carrier-pigeon"):
            pass
