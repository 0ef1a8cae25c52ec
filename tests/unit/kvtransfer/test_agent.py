"""Two agents in one process, over real sockets and a real gRPC server, with each transport."""

from __future__ import annotations

import asyncio

import pytest
from baton.kvtransfer.errors import TransferCode, TransferError
from helpers.kv_agents import FIRST_TOKEN, Prompt, assert_arrived, hand_over, open_handoff, two_nodes
from helpers.waiting import eventually

TRANSPORTS = ["tcp", "shm"]


@pytest.mark.parametrize("transport", TRANSPORTS)
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
