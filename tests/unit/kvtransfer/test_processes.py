"""A sender in a process of its own: memory mapped across processes, and what is left when the process is killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from helpers.kv_agents import LAYOUT, Node, Prompt, assert_arrived, hand_over, options, running, two_nodes
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity

HELPERS = Path(__file__).parents[2]
SENDER = WorkerIdentity("prefill-0", "1" * 32)


@asynccontextmanager
async def sender_process(node: Node, transport: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HELPERS / "helpers" / "kv_sender_process.py"),
        transport,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    receiver = [node.identity.worker_id, node.identity.incarnation, node.address]
    process.stdin.write(json.dumps(receiver).encode() + b"\n")
    try:
        yield process
    finally:
        if process.returncode is None:
            process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)


async def ask(process: asyncio.subprocess.Process, node: Node, what: str, request_id: str, *block_ids: int) -> str:
    node.agent.expect(HandoffKey(request_id, 1), SENDER)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{what} {request_id} {' '.join(map(str, block_ids))}\n".encode())
    while True:  # the program logs on standard output too
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert line, "the sender died"
        if line.startswith(("shm ", "tcp ", "pushing")):
            return line.strip()


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
