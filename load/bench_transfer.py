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
from baton.kvtransfer.transport.registry import TRANSPORT_NAMES
from baton.load.limits import MemoryCopy, SocketLoop
from baton.load.report import Row, median_row
from baton.load.transfer_peer import LAYOUTS, RECEIVER, SENDER, PeerSpec, as_argument, make_agent, round_trip_s

BULK_BYTES = {"4 KiB": 48 << 20, "6 KiB": 48 << 20, "192 KiB": 192 << 20, "1 MiB": 192 << 20}
"""Bytes of one handoff, by layout. Tiny blocks in fewer bytes: that is 12,288 and 8,192 blocks, and no prompt is longer."""

LATENCY_LAYOUT = "360 KiB"
LATENCY_SIZES = {"1 block": 1, "1k tokens": 64, "8k tokens": 512}
_numbers = itertools.count()


def bench_transfer(repeats: int = 9) -> list[Row]:
    """Each transport in turns with its limit, so that both see the same machine."""
    rows: list[Row] = []
    for transport in TRANSPORT_NAMES:
        for layout, num_bytes in BULK_BYTES.items():
            spec = PeerSpec(transport, layout, num_bytes // LAYOUTS[layout].block_bytes)
            rows += asyncio.run(_bench_bulk(spec, repeats))
        spec = PeerSpec(transport, LATENCY_LAYOUT, max(LATENCY_SIZES.values()))
        rows += asyncio.run(_bench_latency(spec, 2 * repeats))
    return rows


async def _bench_bulk(spec: PeerSpec, repeats: int) -> list[Row]:
    num_bytes = spec.num_blocks * spec.block_bytes
    limit: MemoryCopy | SocketLoop = SocketLoop(num_bytes) if spec.transport == "tcp" else MemoryCopy(num_bytes)
    limit_name = "socket loop, 2 processes" if spec.transport == "tcp" else "memory copy, 1 thread"
    speeds, limit_speeds = [], []
    with _receiver(spec) as address:
        agent, memory = make_agent(SENDER, spec)
        await agent.start()
        try:
            await handoff_s(agent, address, spec.num_blocks)  # shakes hands, maps memory, touches pages
            for _ in range(repeats):
                limit_speeds.append(await asyncio.to_thread(limit.gb_per_s))
                speeds.append(num_bytes / await handoff_s(agent, address, spec.num_blocks) / 1e9)
        finally:
            await agent.close()
            memory.close()
            limit.close()
    name = f"{spec.transport}, blocks of {spec.layout}"
    return [median_row(name, "GB/s", speeds, limit_name, limit_speeds)]


async def _bench_latency(spec: PeerSpec, repeats: int) -> list[Row]:
    rows = []
    with _receiver(spec) as address:
        agent, memory = make_agent(SENDER, spec)
        await agent.start()
        try:
            await handoff_s(agent, address, spec.num_blocks)
            bulk_s = statistics.median([await handoff_s(agent, address, spec.num_blocks) for _ in range(5)])
            for name, num_blocks in LATENCY_SIZES.items():
                times_ms, limits_ms = [], []
                for _ in range(repeats):
                    # What cannot be less: the question and its answer for the commit, and the bytes at full speed.
                    trip_s = await round_trip_s(address, 3)
                    limits_ms.append((trip_s + num_blocks / spec.num_blocks * bulk_s) * 1e3)
                    times_ms.append(await handoff_s(agent, address, num_blocks) * 1e3)
                what = f"{spec.transport}, handoff of {name}, last block computed to taken over"
                rows.append(median_row(what, "ms", times_ms, "gRPC round trip + bytes", limits_ms))
        finally:
            await agent.close()
            memory.close()
    return rows


async def handoff_s(agent: TransferAgent, address: str, num_blocks: int) -> float:
    """Seconds from the moment when the blocks are there, with slots granted before, to the acknowledgement."""
    number = next(_numbers)
    names = [number.to_bytes(8, "little") + index.to_bytes(8, "little") for index in range(num_blocks)]
    spec = HandoffSpec(f"bench-{number}", 1, RECEIVER, address, names, num_blocks * 16)
    handoff = agent.open(spec)
    while not handoff.holds_lease:  # noqa: ASYNC110  granted in another task, which has nobody else to tell
        await asyncio.sleep(0.0005)
    begin = time.perf_counter()
    handoff.blocks_ready({index: index for index in range(num_blocks)})
    await handoff.commit(FirstToken(1))
    return time.perf_counter() - begin


@contextmanager
def _receiver(spec: PeerSpec) -> Iterator[str]:
    command = [sys.executable, "-m", "baton.load.transfer_peer", as_argument(spec)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the receiving process did not start")
        yield address
    finally:
        process.communicate(timeout=30)
