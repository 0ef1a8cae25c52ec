"""Blocks out of another GPU's memory. What it shares with other transports is in the tests that run with each, on a GPU where
there is one, else on host memory in its place."""

from __future__ import annotations

import gc
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.host_cuda import HostCuda
from helpers.kv_agents import (
    LAYOUT,
    Node,
    Prompt,
    assert_arrived,
    hand_over,
    make_staged_memory,
    options,
    running,
    two_nodes,
)
from helpers.kv_processes import ask, sender_process
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffKey
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.memory import HostBlockMemory
from baton.kvtransfer.transport import registry
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.transport.cuda_ipc import _OFFER, CudaIpcTransport, _PeerRows
from baton.kvtransfer.transport.cuda_runtime import CudaError, open_runtime
from baton.kvtransfer.transport.registry import make_transports

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: this machine has none")


@pytest.fixture
def on_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.kv_agents.cache_device", lambda: "cpu")
    monkeypatch.setattr("baton.kvtransfer.transport.cuda_runtime.open_runtime", HostCuda)


def transport_of(node: Node) -> Any:
    return node.agent._context.transports["cuda_ipc"]


@needs_gpu
async def test_blocks_of_a_gpu_arrive_in_another_cache_of_it() -> None:
    """In two agents of one process, so without opening a handle."""
    async with two_nodes("cuda_ipc", options=options(canary_bytes=1)) as (sender, receiver):
        assert sender.memory.device.type == "cuda"  # type: ignore[attr-defined]
        prompt = Prompt([3, 5, 7, 11])
        assert (await hand_over(sender, receiver, prompt)).transport == "cuda_ipc"
        assert_arrived(sender, receiver, prompt)


@needs_gpu
async def test_two_processes_share_a_gpu_and_a_killed_one_leaves_nothing() -> None:
    quick = options(limits={"lease_s": 0.5}, canary_bytes=1)
    async with (
        running("decode-0", transports="cuda_ipc", options=quick) as node,
        sender_process(node, "cuda_ipc") as process,
    ):
        assert await ask(process, node, "whole", "first", 3, 1, 7) == "cuda_ipc 3"
        for slot in node.host.slots[HandoffKey("first", 1)]:
            assert node.block(slot.block_id) == random.Random((3, 1, 7)[slot.index]).randbytes(LAYOUT.block_bytes)
        assert await ask(process, node, "half", "second", 4, 5) == "pushing"
        await eventually(lambda: node.agent.stats().bytes_received["cuda_ipc"] == 4 * LAYOUT.block_bytes)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        released = [(HandoffKey("second", 1), TransferCode.EXPIRED, True)]
        await eventually(lambda: node.host.releases == released, what="the lease to run out")
        assert node.agent.stats().num_receiving == 0
        await eventually(lambda: not opened_memory(), what="the dead process's memory to be let go")


def opened_memory() -> list[Any]:
    """What is open here of other processes' device memory."""
    return [pair for pair in gc.get_objects() if isinstance(pair, _PeerRows) and pair.is_opened]


def test_without_the_bindings_it_is_refused_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    memory = make_staged_memory(4)
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(TransferError, match=r"cuda_ipc: it is not installed .*'baton-llm\[cuda-ipc\]'") as caught:
            make_transports("cuda_ipc", memory, executor)
        assert caught.value.code is TransferCode.INCOMPATIBLE
    memory.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_where_cuda_does_not_work_it_is_refused_with_what_cuda_says() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install 'baton-llm[cuda-ipc]'")
    with pytest.raises(CudaError, match="cudaSetDevice: cudaError"):
        open_runtime(torch.device("cuda", 0))


def test_memory_that_cannot_be_exported_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that may not share a GPU's memory."""
    made: list[HostCuda] = []

    class Unshared(HostCuda):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

        def export(self, address: int) -> bytes:
            raise CudaError("cudaIpcGetMemHandle: cudaErrorNotSupported")

    monkeypatch.setattr("baton.kvtransfer.transport.cuda_runtime.open_runtime", Unshared)
    memory = make_staged_memory(4)
    with ThreadPoolExecutor(1) as executor, pytest.raises(TransferError, match="cudaErrorNotSupported"):
        make_transports("cuda_ipc", memory, executor)
    (cuda,) = made
    assert not cuda._allocated
    memory.close()


def test_a_cache_in_host_memory_is_refused() -> None:
    memory = HostBlockMemory(4, LAYOUT.block_bytes)
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(TransferError, match="cuda_ipc: the KV cache is not in a GPU's memory"),
    ):
        make_transports("cuda_ipc", memory, executor)
    memory.close()


@pytest.mark.usefixtures("on_host_memory")
async def test_auto_leaves_it_out_without_a_gpu_and_prefers_it_to_memory_of_the_host_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = make_staged_memory(4)
    with ThreadPoolExecutor(1) as executor:
        if not torch.cuda.is_available():
            assert "cuda_ipc" not in make_transports("auto", memory, executor)
        monkeypatch.setattr(registry, "_is_usual", lambda name, memory: name in ("inproc", "cuda_ipc", "shm", "tcp"))
        transports = make_transports("auto", memory, executor)
        assert list(transports) == ["inproc", "cuda_ipc", "shm", "tcp"]
        await transports["cuda_ipc"].close()

        def refuse(device: torch.device) -> HostCuda:
            raise CudaError("cudaMalloc: cudaErrorNotSupported")

        monkeypatch.setattr("baton.kvtransfer.transport.cuda_runtime.open_runtime", refuse)
        assert list(make_transports("auto", memory, executor)) == ["inproc", "shm", "tcp"]
        with pytest.raises(TransferError, match="cuda_ipc: cudaMalloc: cudaErrorNotSupported"):
            make_transports("cuda_ipc", memory, executor)
    memory.close()


@pytest.mark.usefixtures("on_host_memory")
async def test_it_is_taken_where_both_have_it_on_one_host() -> None:
    ways = ("cuda_ipc", "shm", "tcp")
    async with (
        running("prefill-0", transports=ways, memory=make_staged_memory(8)) as sender,
        running("decode-0", transports=ways, memory=make_staged_memory(8)) as receiver,
        running("decode-1", transports=("shm", "tcp"), memory=make_staged_memory(8)) as other,
    ):
        sender.fill(1)
        assert (await hand_over(sender, receiver, Prompt([1], request_id="gpu"))).transport == "cuda_ipc"
        assert (await hand_over(sender, other, Prompt([1], request_id="none"))).transport == "shm"


@pytest.mark.usefixtures("on_host_memory")
async def test_every_field_of_an_offer_is_checked_before_anything_is_opened() -> None:
    async with (
        running("decode-0", transports="cuda_ipc") as ours,
        running("prefill-0", transports="cuda_ipc") as theirs,
    ):
        transport = transport_of(ours)
        good = transport_of(theirs).offer()
        magic, pid, num_rows, row_bytes, handle = _OFFER.unpack(good)
        bad = {
            "the peer does not say where its memory is": None,
            "an offer of 0 bytes": b"",
            f"an offer of {len(good) - 1} bytes": good[:-1],
            f"an offer of {len(good) + 1} bytes": good + b"x",
            "an offer of another version": _OFFER.pack(b"BATONCI2", pid, num_rows, row_bytes, handle),
            f"rows of {row_bytes + 1} bytes there, {row_bytes} here": _OFFER.pack(
                magic, pid, num_rows, row_bytes + 1, handle
            ),
            "0 rows": _OFFER.pack(magic, pid, 0, row_bytes, handle),
            f"{2**32} rows": _OFFER.pack(magic, pid, 2**32, row_bytes, handle),
            "no memory of this process has that handle": _OFFER.pack(magic, pid, num_rows, row_bytes, bytes(64)),
            "cannot be opened: cudaIpcOpenMemHandle: cudaErrorInvalidResourceHandle": _OFFER.pack(
                magic, pid + 1, num_rows, row_bytes, bytes(64)
            ),
        }
        for reason, ticket in bad.items():
            tickets = {} if ticket is None else {"cuda_ipc": ticket}
            with pytest.raises(TransferError, match=reason) as caught:
                transport.attach(Offer(host_id(), None, tickets))
            assert caught.value.code is TransferCode.INCOMPATIBLE
        for host in ("", "another host"):
            with pytest.raises(TransferError, match="cuda_ipc: host"):
                transport.attach(Offer(host, None, {"cuda_ipc": good}))
        assert transport._cuda.num_opened == 0
        source = transport.attach(Offer(host_id(), None, {"cuda_ipc": good}))
        assert source.num_rows == num_rows


@pytest.mark.usefixtures("on_host_memory")
async def test_a_handle_of_another_process_is_opened_for_a_pair_and_closed_when_nothing_reads_any_more() -> None:
    async with (
        running("decode-0", transports="cuda_ipc") as ours,
        running("prefill-0", transports="cuda_ipc") as theirs,
    ):
        transport: CudaIpcTransport = transport_of(ours)
        magic, pid, num_rows, row_bytes, handle = _OFFER.unpack(transport_of(theirs).offer())
        offer = Offer(host_id(), None, {"cuda_ipc": _OFFER.pack(magic, pid + 1, num_rows, row_bytes, handle)})
        cuda: Any = transport._cuda
        idle, busy = transport.attach(offer), transport.attach(offer)
        assert isinstance(busy, _PeerRows)
        assert cuda.num_opened == 2
        transport.detach(idle)
        assert cuda.num_opened == 1
        busy.num_reads = 1  # as while a copy is under way on the thread
        transport.detach(busy)
        assert cuda.num_opened == 1
        busy.num_reads = 0
        transport._fetch(busy, [], [])
        assert cuda.num_opened == 0


@pytest.mark.usefixtures("on_host_memory")
async def test_a_copy_that_fails_is_told_and_the_handoff_goes_on_by_the_next_transport() -> None:
    ways = ("cuda_ipc", "tcp")
    async with (
        running("prefill-0", transports=ways, memory=make_staged_memory(8)) as sender,
        running("decode-0", transports=ways, memory=make_staged_memory(8)) as receiver,
    ):
        sender.fill(1)
        assert (await hand_over(sender, receiver, Prompt([1], request_id="before"))).transport == "cuda_ipc"
        transport_of(receiver)._cuda.fail_with = CudaError("cudaEventSynchronize: cudaErrorIllegalAddress")
        prompt = Prompt([2, 3], request_id="after")
        report = await hand_over(sender, receiver, prompt)
        assert report.transport == "tcp"
        assert report.fallbacks[0].startswith("cuda_ipc: ")
        assert_arrived(sender, receiver, prompt)


@pytest.mark.usefixtures("on_host_memory")
async def test_bytes_that_are_not_what_was_announced_never_reach_the_cache() -> None:
    async with two_nodes("cuda_ipc") as (sender, receiver):
        before = receiver.contents()
        mirror = sender.memory._mirror  # type: ignore[attr-defined]
        original = sender.memory._gather  # type: ignore[attr-defined]

        def spoil(rows: list[int], block_ids: list[int]) -> None:
            original(rows, block_ids)
            mirror[rows[0]][7] ^= 1  # on the device only: the checksum was of what stands on the host

        sender.memory._gather = spoil  # type: ignore[attr-defined]
        with pytest.raises(TransferError) as caught:
            await hand_over(sender, receiver, Prompt([1]))
        assert caught.value.code is TransferCode.CHECKSUM
        assert receiver.contents() == before
