"""Handing blocks from one process to another: GB/s beside a memory copy and a plain socket, and the latency of a handoff."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.messages import FirstToken
from baton.kvtransfer.sending import HandoffSpec
from baton.load.limits import memcpy_gb_per_s, socket_gb_per_s
from baton.load.report import Row, median_row
from baton.load.transfer_peer import LAYOUT, RECEIVER, SENDER, make_agent, round_trip_s

NUM_BLOCKS_BULK = 512  # 8,192 tokens, 180 MiB
LATENCY_SIZES = {"1 block": 1, "1k tokens": 64, "8k tokens": 512}
_numbers = itertools.count()


def bench_transfer(repeats: int = 5) -> list[Row]:
    """Each transport in turns with its limit, so that both see the same machine."""
    rows: list[Row] = []
    limits = {"shm": ("memcpy, 1 thread", memcpy_gb_per_s), "tcp": ("socket, sendall and recv_into", socket_gb_per_s)}
    for transport, (limit_name, measure_limit) in limits.items():
        with _receiver(transport) as address:
            rows += asyncio.run(_bench(transport, address, limit_name, measure_limit, repeats))
    return rows


async def _bench(transport: str, address: str, limit_name: str, measure_limit, repeats: int) -> list[Row]:  # type: ignore[no-untyped-def]
    agent, memory = make_agent(SENDER, transport)
    await agent.start()
    try:
        await _handoff_s(agent, address, NUM_BLOCKS_BULK)  # shakes hands, maps memory, touches pages
        num_bytes = NUM_BLOCKS_BULK * LAYOUT.block_bytes
        speeds, limit_speeds = [], []
        for _ in range(repeats):
            limit_speeds.append(await asyncio.to_thread(measure_limit, num_bytes))
            speeds.append(num_bytes / await _handoff_s(agent, address, NUM_BLOCKS_BULK) / 1e9)
        rows = [median_row(f"{transport} transfer of 360 KiB blocks", "GB/s", speeds, limit_name, limit_speeds)]
        trip_s = await round_trip_s(address)
        speed = statistics.median(speeds) * 1e9
        for name, num_blocks in LATENCY_SIZES.items():
            times_ms = [await _handoff_s(agent, address, num_blocks) * 1e3 for _ in range(4 * repeats)]
            # What cannot be less: the question and its answer for the commit, and the bytes at the speed above.
            limit_ms = (trip_s + num_blocks * LAYOUT.block_bytes / speed) * 1e3
            rows.append(
                median_row(
                    f"{transport} handoff of {name}, last block computed to taken over",
                    "ms",
                    times_ms,
                    "gRPC round trip + bytes",
                    [limit_ms],
                )
            )
        return rows
    finally:
        await agent.close()
        memory.close()


async def _handoff_s(agent: TransferAgent, address: str, num_blocks: int) -> float:
    """Seconds from the moment when the blocks are there, with slots granted before, to the acknowledgement."""
    number = next(_numbers)
    names = [number.to_bytes(8, "little") + index.to_bytes(8, "little") for index in range(num_blocks)]
    spec = HandoffSpec(f"bench-{number}", 1, RECEIVER, address, names, num_blocks * LAYOUT.block_size)
    handoff = agent.open(spec)
    while not handoff.holds_lease:  # noqa: ASYNC110  granted in another task, which has nobody else to tell
        await asyncio.sleep(0.0005)
    begin = time.perf_counter()
    handoff.blocks_ready({index: index for index in range(num_blocks)})
    await handoff.commit(FirstToken(1))
    return time.perf_counter() - begin


@contextmanager
def _receiver(transport: str) -> Iterator[str]:
    command = [sys.executable, "-m", "baton.load.transfer_peer", transport]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the receiving process did not start")
        yield address
    finally:
        process.communicate(timeout=30)
