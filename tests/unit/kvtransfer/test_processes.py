"""A sender in a process of its own: memory mapped across processes, and what is left when the process is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
import uvloop
from helpers.kv_agents import LAYOUT, Prompt, assert_arrived, hand_over, options, running, two_nodes
from helpers.kv_processes import ask, sender_process
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.identity import HandoffKey


def mappings_of(pid: int) -> int:
    """How many block pools of process ``pid``'s are mapped here."""
    pools = {os.stat(f"/proc/{pid}/fd/{fd}").st_ino for fd in os.listdir(f"/proc/{pid}/fd") if is_pool(pid, fd)}
    return count_mapped(pools)


def is_pool(pid: int, fd: str) -> bool:
    return os.readlink(f"/proc/{pid}/fd/{fd}").startswith("/memfd:baton-kv")


def count_mapped(inodes: set[int]) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:baton-kv" in line and int(line.split()[4]) in inodes for line in lines)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_two_processes_hand_over_and_a_killed_one_leaves_nothing(transport: str) -> None:
    quick = options(limits={"lease_s": 0.5})
    async with running("decode-0", options=quick) as node, sender_process(node, transport) as process:
        assert await ask(process, node, "whole", "first", 3, 1, 7) == f"{transport} 3"
        for slot in node.host.slots[HandoffKey("first", 1)]:
            assert node.block(slot.block_id) == random.Random((3, 1, 7)[slot.index]).randbytes(LAYOUT.block_bytes)
        assert mappings_of(process.pid) == (transport == "shm")
        pools = {
            os.stat(f"/proc/{process.pid}/fd/{fd}").st_ino
            for fd in os.listdir(f"/proc/{process.pid}/fd")
            if is_pool(process.pid, fd)
        }

        assert await ask(process, node, "half", "second", 4, 5) == "pushing"
        await eventually(lambda: node.agent.stats().bytes_received[transport] == 4 * LAYOUT.block_bytes)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        key = HandoffKey("second", 1)
        await eventually(lambda: node.host.releases == [(key, TransferCode.EXPIRED, True)], what="the lease to run out")
        assert node.agent.stats().num_receiving == 0
        await eventually(lambda: count_mapped(pools) == 0, what="the dead process's memory to be let go")
        assert not [name for name in os.listdir("/dev/shm") if "baton" in name]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_it_runs_on_uvloop(transport: str) -> None:
    async def main() -> None:
        async with two_nodes(transport) as (sender, receiver):
            prompt = Prompt(list(range(20)))
            await hand_over(sender, receiver, prompt)
            assert_arrived(sender, receiver, prompt)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
