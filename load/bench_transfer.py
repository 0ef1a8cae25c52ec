"""Handing blocks from one process to another: GB/s beside a memory copy and a plain socket, and the latency of a handoff."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch

from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferError
from baton.kvtransfer.messages import FirstToken
from baton.kvtransfer.sending import HandoffSpec, SenderHandoff
from baton.kvtransfer.transport.registry import TRANSPORT_NAMES
from baton.load.limits import DeviceCopy, MemoryCopy, SocketLoop
from baton.load.report import Row, median_row
from baton.load.transfer_peer import (
    LAYOUTS,
    RECEIVER,
    SENDER,
    PeerSpec,
    as_argument,
    make_agent,
    receiver,
    rested_collector,
    round_trip_s,
)

BULK_BYTES = {"4 KiB": 48 << 20, "6 KiB": 48 << 20, "192 KiB": 192 << 20, "1 MiB": 192 << 20}
"""Bytes of one handoff, by layout. Tiny blocks in fewer bytes: that is 12,288 and 8,192 blocks, and no prompt is longer."""

DEVICE_LAYOUTS = ("192 KiB", "1 MiB")
"""What is also handed over between caches in a GPU's memory, where there is one."""

LATENCY_LAYOUT = "360 KiB"
LATENCY_SIZES = {"1 block": 1, "1k tokens": 64, "8k tokens": 512}

# A prompt of 4,096 tokens in chunks of 256, over a link that takes 0.4 s for its KV; computing takes 12 times as long.
OVERLAP_LAYOUT, OVERLAP_BLOCKS, NUM_CHUNKS = "192 KiB", 256, 16
OVERLAP_BYTES_PER_S = 120e6
COMPUTE_TO_TRANSFER = 12
_numbers = itertools.count()


def bench_transfer(repeats: int = 9, transports: Sequence[str] = TRANSPORT_NAMES) -> list[Row]:
    """Each transport in turns with its limit, so that both see the same machine. One that does not work here is skipped."""
    rows: list[Row] = []
    for transport in transports:
        try:
            rows += asyncio.run(_bench(transport, repeats))
        except TransferError as error:
            rows.append(Row(transport, None, "", skipped=error.message))
    return rows


async def _bench(transport: str, repeats: int) -> list[Row]:
    rows: list[Row] = []
    if torch.cuda.is_available():
        for layout in DEVICE_LAYOUTS:
            num_blocks = BULK_BYTES[layout] // LAYOUTS[layout].block_bytes
            rows += await _bench_bulk(PeerSpec(transport, layout, num_blocks, device="cuda"), repeats)
    if transport == "cuda_ipc":
        return rows or [Row(transport, None, "", skipped="needs a GPU: this machine has none")]
    for layout, num_bytes in BULK_BYTES.items():
        spec = PeerSpec(transport, layout, num_bytes // LAYOUTS[layout].block_bytes)
        rows += await _bench_bulk(spec, repeats)
    rows += await _bench_latency(PeerSpec(transport, LATENCY_LAYOUT, max(LATENCY_SIZES.values())), 2 * repeats)
    return rows + await _bench_overlap(PeerSpec(transport, OVERLAP_LAYOUT, OVERLAP_BLOCKS, OVERLAP_BYTES_PER_S), 3)


async def _bench_bulk(spec: PeerSpec, repeats: int) -> list[Row]:
    num_bytes = spec.num_blocks * spec.block_bytes
    limit: MemoryCopy | SocketLoop | DeviceCopy
    if spec.device != "cpu":
        limit, limit_name = DeviceCopy(num_bytes), "GPU to locked host memory"
    elif spec.transport == "tcp":
        limit, limit_name = SocketLoop(num_bytes), "socket loop, 2 processes"
    else:
        limit, limit_name = MemoryCopy(num_bytes), "memory copy, 1 thread"
    speeds, limit_speeds = [], []
    try:
        async with _pair(spec) as (agent, address):
            await handoff_s(agent, address, spec.num_blocks)  # shakes hands, maps memory, touches pages
            for _ in range(repeats):
                limit_speeds.append(await asyncio.to_thread(limit.gb_per_s))
                speeds.append(num_bytes / await handoff_s(agent, address, spec.num_blocks) / 1e9)
    finally:
        limit.close()
    name = f"{spec.transport}, {'' if spec.device == 'cpu' else 'GPU, '}blocks of {spec.layout}"
    return [median_row(name, "GB/s", speeds, limit_name, limit_speeds)]


async def _bench_latency(spec: PeerSpec, repeats: int) -> list[Row]:
    rows = []
    async with _pair(spec) as (agent, address):
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
    return rows


async def _bench_overlap(spec: PeerSpec, repeats: int) -> list[Row]:
    """What is left to see of the transfer when chunks are sent while the next is computed, beside all of it at the end."""
    assert spec.bytes_per_s is not None
    compute_s = COMPUTE_TO_TRANSFER * spec.num_blocks * spec.block_bytes / spec.bytes_per_s
    visible_ms, whole_ms = [], []
    async with _pair(spec) as (agent, address):
        await handoff_s(agent, address, 1)
        for _ in range(repeats):
            whole_ms.append(await handoff_s(agent, address, spec.num_blocks) * 1e3)
            handoff = await _open(agent, address, spec.num_blocks)
            per_chunk = spec.num_blocks // NUM_CHUNKS
            for first in range(0, spec.num_blocks, per_chunk):
                await asyncio.sleep(compute_s / NUM_CHUNKS)  # another device computes
                handoff.blocks_ready({index: index for index in range(first, first + per_chunk)})
            begin = time.perf_counter()
            await handoff.commit(FirstToken(1))
            visible_ms.append((time.perf_counter() - begin) * 1e3)
    what = f"{spec.transport}, transfer seen after {NUM_CHUNKS} chunks, computing {COMPUTE_TO_TRANSFER}:1"
    return [median_row(what, "ms", visible_ms, "without overlap", whole_ms)]


async def handoff_s(agent: TransferAgent, address: str, num_blocks: int) -> float:
    """Seconds from the moment when the blocks are there, with slots granted before, to the acknowledgement."""
    handoff = await _open(agent, address, num_blocks)
    begin = time.perf_counter()
    handoff.blocks_ready({index: index for index in range(num_blocks)})
    await handoff.commit(FirstToken(1))
    return time.perf_counter() - begin


async def _open(agent: TransferAgent, address: str, num_blocks: int) -> SenderHandoff:
    """A handoff that has its slots."""
    number = next(_numbers)
    names = [number.to_bytes(8, "little") + index.to_bytes(8, "little") for index in range(num_blocks)]
    handoff = agent.open(HandoffSpec(f"bench-{number}", 1, RECEIVER, address, names, num_blocks * 16))
    while not handoff.holds_lease:  # granted in another task, which has nobody else to tell
        if (error := await handoff.wait() if handoff.is_over else None) is not None:
            raise error
        await asyncio.sleep(0.0005)
    return handoff


@asynccontextmanager
async def _pair(spec: PeerSpec) -> AsyncIterator[tuple[TransferAgent, str]]:
    """A sender, and the address of a receiver. Raises TransferError when the transport does not work here."""
    agent, memory = make_agent(SENDER, spec)
    try:
        async with _receiver(spec) as address:
            await agent.start()
            try:
                with rested_collector():
                    yield agent, address
            finally:
                await agent.close()
    finally:
        memory.close()


@asynccontextmanager
async def _receiver(spec: PeerSpec) -> AsyncIterator[str]:
    """The gRPC address of a receiver: another process, except for the transport that stays in one."""
    if spec.transport == "inproc":
        async with receiver(spec) as address:
            yield address
        return
    command = [sys.executable, "-m", "baton.load.transfer_peer", as_argument(spec)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220, S603
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the receiving process did not start")
        yield address
    finally:
        process.communicate(timeout=30)
