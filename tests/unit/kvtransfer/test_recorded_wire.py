"""Version N-1 of the wire as it was recorded, against the agent of today: whole handoffs, over real sockets and gRPC."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.kv_agents import FIRST_TOKEN, Node, Prompt, options, running
from helpers.kv_recorder import BLOCK_IDS, COMPATIBILITY, NUM_BLOCKS, SENDER_SEED, SESSIONS, Event
from helpers.kv_replay import ReplayedSender, calls, load, recorded_tokens, replayed_receiver
from helpers.waiting import eventually

from baton.api.kvtransfer.v1 import kvtransfer_pb2 as pb
from baton.kvtransfer.canary import nonce_of, pattern
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.sending import HandoffSpec
from baton.kvtransfer.transport import frames
from baton.kvtransfer.versions import WIRE_VERSIONS

BEFORE = WIRE_VERSIONS.newest - 1
SENDER = WorkerIdentity("prefill-0", "a" * 32)
RECEIVER = WorkerIdentity("decode-0", "b" * 32)
PROMPT = Prompt(BLOCK_IDS)
HANDOFFS = ["handoff-tcp", "handoff-shm"]


def agent(identity: WorkerIdentity, session: str) -> Any:
    transport = session.rpartition("-")[2]
    return running(
        identity.worker_id,
        incarnation=identity.incarnation,
        compatibility=COMPATIBILITY,
        num_blocks=NUM_BLOCKS,
        transports=transport,
        options=options(canary_bytes=1),
    )


def of_sender() -> HostBlockMemory:
    """The memory of the sender, as it was in the recording: its blocks, and its canary."""
    memory = HostBlockMemory(NUM_BLOCKS, COMPATIBILITY.layout.block_bytes)
    Node(None, memory, None, "", None).fill(SENDER_SEED)  # type: ignore[arg-type]
    memory.rows.row(memory.canary_row(0))[:] = pattern(nonce_of(SENDER), memory.block_bytes)
    return memory


def test_every_session_is_recorded_in_the_version_before_the_newest() -> None:
    for session in SESSIONS:
        events = load(BEFORE, session)
        versions = {bytes.fromhex(event["bytes"])[4:6] for event in events if "frame" in event}
        assert versions == {BEFORE.to_bytes(2, "little")}
    told = [event for session in SESSIONS for event in load(BEFORE, session)]
    assert {event["frame"] for event in told if "frame" in event} == {kind.name for kind in frames.FrameKind}
    assert {event["call"] for event in told if "call" in event} == {
        "Handshake",
        "Reserve",
        "Commit",
        "Abort",
        "Heartbeat",
    }


@pytest.mark.parametrize("session", HANDOFFS)
async def test_a_recorded_sender_hands_over_to_the_receiver_of_today(
    session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, memory = load(BEFORE, session), of_sender()
    async with agent(RECEIVER, session) as node:
        node.fill(9)
        node.host.already_here.add(PROMPT.names[1])
        node.agent.expect(PROMPT.key, SENDER)
        recorded_tokens(events, monkeypatch)
        if session == "handoff-shm":
            monkeypatch.setattr("baton.kvtransfer.transport.shm.host_id", lambda: recorded_host(events))
        shared = memory.shared if session == "handoff-shm" else None
        async with ReplayedSender(events, node.address, memory=shared) as sender:
            await sender.run()
        first_token, report = node.host.commits[PROMPT.key]
        assert first_token == FIRST_TOKEN
        assert (report.num_blocks, report.num_blocks_skipped, report.checksum) == (2, 1, "xxh3_64 ok")
        for slot in node.host.slots[PROMPT.key]:
            assert node.block(slot.block_id) == bytes(memory.rows.row(BLOCK_IDS[slot.index]))
        (pair,) = node.agent._receiving._pairs.values()
        assert pair.version == BEFORE
        assert node.agent.stats().fenced == 0
    memory.close()


def recorded_host(events: list[Event]) -> str:
    """The machine of the recording, whose id the recorded sender tells."""
    host: str = pb.HandshakeRequest.FromString(bytes.fromhex(calls(events, "Handshake")[0]["request"])).host_id
    return host or host_id()


async def test_a_recorded_sender_gives_up_and_the_receiver_of_today_has_its_slots_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = load(BEFORE, "aborted-tcp")
    async with agent(RECEIVER, "aborted-tcp") as node:
        node.host.already_here.add(PROMPT.names[1])
        node.agent.expect(PROMPT.key, SENDER)
        recorded_tokens(events, monkeypatch)
        async with ReplayedSender(events, node.address) as sender:
            await sender.run()
        await eventually(lambda: node.host.releases == [(PROMPT.key, TransferCode.ABORTED, True)], timeout_s=30)
        assert len(node.host.free) == NUM_BLOCKS


async def test_a_recorded_sender_is_told_in_its_own_version_that_a_handoff_is_over_and_a_stranger_that_he_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = load(BEFORE, "gone-tcp")
    async with agent(RECEIVER, "gone-tcp") as node:
        node.host.already_here.add(PROMPT.names[1])
        node.agent.expect(PROMPT.key, SENDER)
        recorded_tokens(events, monkeypatch)
        over = next(place for place, event in enumerate(events) if event.get("frame") == "GONE")
        async with ReplayedSender(events[:over], node.address) as sender:
            await sender.run()
            node.agent.forget(PROMPT.key)
            sender.events = events[over:]
            await sender.run()
        assert node.host.releases == [(PROMPT.key, TransferCode.ABORTED, True)]


def spec_for(address: str) -> HandoffSpec:
    return HandoffSpec("req", 1, RECEIVER, address, PROMPT.names, len(BLOCK_IDS) * COMPATIBILITY.layout.block_size - 3)


@pytest.mark.parametrize("session", HANDOFFS)
async def test_the_sender_of_today_hands_over_to_a_recorded_receiver(session: str) -> None:
    events = load(BEFORE, session)
    async with agent(SENDER, session) as node, replayed_receiver(events) as (replayed, address):
        node.fill(SENDER_SEED)
        handoff = node.agent.open(spec_for(address))
        handoff.blocks_ready(PROMPT.all_ready)
        report = await handoff.commit(FIRST_TOKEN)
        assert replayed.failure is None
        assert replayed.frames_done.is_set()
        assert replayed.asked == ["Handshake", "Reserve", "Commit"]
        assert (report.num_blocks, report.num_blocks_skipped) == (2, 1)
        assert node.agent.stats().handoffs_sent == 1


async def test_the_sender_of_today_gives_up_as_a_recorded_receiver_understands_it() -> None:
    async with (
        agent(SENDER, "aborted-tcp") as node,
        replayed_receiver(load(BEFORE, "aborted-tcp")) as (replayed, address),
    ):
        node.fill(SENDER_SEED)
        handoff = node.agent.open(spec_for(address))
        handoff.blocks_ready(PROMPT.all_ready)
        await eventually(replayed.frames_done.is_set, timeout_s=30)
        await handoff.abort("nobody wants it")
        await eventually(lambda: "Abort" in replayed.asked, timeout_s=30)
        assert replayed.failure is None


async def test_the_sender_of_today_hears_from_a_recorded_receiver_that_the_handoff_is_over() -> None:
    events = load(BEFORE, "gone-tcp")
    gone = next(place for place, event in enumerate(events) if event.get("frame") == "GONE")
    async with agent(SENDER, "gone-tcp") as node, replayed_receiver(events[: gone + 1]) as (replayed, address):
        node.fill(SENDER_SEED)
        handoff = node.agent.open(spec_for(address))
        handoff.blocks_ready(PROMPT.all_ready)
        error = await handoff.wait()
        assert isinstance(error, TransferError)
        assert (error.code, error.message) == (TransferCode.ABORTED, "the receiver no longer wants it")
        assert replayed.failure is None
