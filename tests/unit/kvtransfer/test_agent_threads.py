"""Handoffs between agents that hash and copy on several threads: equal bytes, and every ending while they are at it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack

import pytest
from helpers.kv_agents import FIRST_TOKEN, Prompt, assert_arrived, hand_over, open_handoff, options, running, two_nodes
from helpers.kv_hash_gate import HashGate, close_hash_gate
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.layout import Compatibility, KVLayout
from baton.kvtransfer.rows import Rows

WAIT_S = 30
# 192 KiB a block, of which five are a piece of work.
LAYOUT = KVLayout(num_layers=24, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")
AGENTS = {
    "compatibility": Compatibility("threads", LAYOUT),
    "num_blocks": 48,
    "options": options(num_send_threads=3, num_copy_threads=4),
}
PROMPT = [*range(20, 48), *range(19, -1, -1)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> HashGate:
    return close_hash_gate(monkeypatch)


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_blocks_arrive_byte_for_byte(transport: str) -> None:
    async with two_nodes(transport, **AGENTS) as (sender, receiver):
        prompt = Prompt(PROMPT)
        report = await hand_over(sender, receiver, prompt)
        assert report.num_blocks == len(PROMPT)
        assert_arrived(sender, receiver, prompt)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_an_abort_while_threads_hash_lets_go_of_the_blocks_when_none_is_read_any_more(
    transport: str, gate: HashGate
) -> None:
    async with two_nodes(transport, **AGENTS) as (sender, receiver):
        prompt = Prompt(PROMPT)
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready(prompt.all_ready)
        await eventually(lambda: len(gate.threads) >= 2, what="two threads that hash")
        before = receiver.contents()
        aborting = asyncio.create_task(handoff.abort("no longer wanted"))
        # The receiver has heard, and has its slots back: nothing was sent yet.
        await eventually(lambda: receiver.agent.stats().num_receiving == 0)
        assert not aborting.done()
        assert prompt.done == []
        gate.is_open.set()
        await asyncio.wait_for(aborting, WAIT_S)
        assert gate.num_running == 0
        assert [error.code for error in prompt.done if error] == [TransferCode.ABORTED]
        assert receiver.contents() == before
        again = Prompt(PROMPT, request_id="again")  # the same threads, the same connection
        await hand_over(sender, receiver, again)
        assert_arrived(sender, receiver, again)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_sender_that_closes_while_threads_hash_has_quiet_memory_when_it_is_closed(
    transport: str, gate: HashGate
) -> None:
    async with running("decode-0", transports=transport, **AGENTS) as receiver, AsyncExitStack() as stack:
        sender = await stack.enter_async_context(running("prefill-0", transports=transport, **AGENTS))
        sender.fill(1)
        prompt = Prompt(PROMPT)
        handoff = open_handoff(sender, receiver, prompt)
        handoff.blocks_ready(prompt.all_ready)
        committing = asyncio.create_task(handoff.commit(FIRST_TOKEN))
        await eventually(lambda: len(gate.threads) >= 2, what="two threads that hash")
        closing = asyncio.create_task(stack.pop_all().aclose())
        await eventually(lambda: receiver.agent.stats().num_receiving == 0)  # it was told
        assert not closing.done()
        gate.is_open.set()
        await asyncio.wait_for(closing, WAIT_S)
        assert gate.num_running == 0
        with pytest.raises(TransferError, match="shutting down"):
            await committing
        assert len(prompt.done) == 1


async def test_a_block_that_changes_while_threads_copy_is_found_and_sent_again() -> None:
    """What each thread copied is checked as one thread would."""
    async with two_nodes("shm", **AGENTS) as (sender, receiver):
        copy_from, is_spoilt = Rows.copy_from, threading.Event()

        def spoil(rows: Rows, source: Rows, pairs: list[tuple[int, int]]) -> list[int]:
            checksums = copy_from(rows, source, pairs)
            if pairs[0][0] == 30 and not is_spoilt.is_set():
                is_spoilt.set()
                checksums[0] ^= 1
            return checksums

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Rows, "copy_from", spoil)
            prompt = Prompt(PROMPT)
            await hand_over(sender, receiver, prompt)
        assert is_spoilt.is_set()
        assert receiver.agent.stats().corrupt_blocks == 1
        assert_arrived(sender, receiver, prompt)
