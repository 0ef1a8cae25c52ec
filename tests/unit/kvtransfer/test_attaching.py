"""Coming to a peer's memory takes a library or a driver its time: what happens on the receiver meanwhile."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import host_cuda
from helpers.host_cuda import HostCuda
from helpers.kv_agents import COMPATIBILITY, Node, Prompt, assert_arrived, hand_over, running
from helpers.waiting import eventually

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.handshake import Handshake, HandshakeReply
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.transport import cuda_runtime
from baton.kvtransfer.transport.base import Offer, attach
from baton.kvtransfer.transport.cuda_ipc import _OFFER, CudaIpcTransport
from baton.kvtransfer.transport.cuda_runtime import CudaRuntime

WAIT_S = 30


@dataclass
class Opening:
    """Handles of a driver that takes its time with each until it may go on."""

    threads: list[str] = field(default_factory=list)
    may_go_on: list[threading.Event] = field(default_factory=list)


@dataclass
class Bench:
    receiver: Node
    opening: Opening
    ticket: bytes  # of memory that has to be opened

    @property
    def transport(self) -> Any:
        return self.receiver.agent._context.transports["cuda_ipc"]

    @property
    def offer(self) -> Offer:
        return Offer(host_id(), None, {"cuda_ipc": self.ticket})

    def shake(self, incarnation: str = "1" * 32) -> asyncio.Task[HandshakeReply]:
        sender = WorkerIdentity("prefill-0", incarnation)
        ours = Handshake(sender, self.receiver.identity, COMPATIBILITY, ("cuda_ipc",), self.offer)
        return asyncio.create_task(self.receiver.agent._receiving.handshake(ours))


@asynccontextmanager
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr("helpers.kv_agents.cache_device", lambda: "cpu")
    async with (
        running("decode-0", transports="cuda_ipc") as receiver,
        running("prefill-9", transports="cuda_ipc") as sender,
    ):
        theirs: Any = sender.agent._context.transports["cuda_ipc"]
        magic, pid, num_rows, row_bytes, handle = _OFFER.unpack(theirs.offer())
        setup = Bench(receiver, Opening(), _OFFER.pack(magic, pid + 1, num_rows, row_bytes, handle))
        cuda, opening = setup.transport._cuda, setup.opening
        original = cuda.open

        def slowly(handle: bytes) -> int:
            opening.threads.append(threading.current_thread().name)
            gate = threading.Event()
            opening.may_go_on.append(gate)
            assert gate.wait(WAIT_S)
            return int(original(handle))

        cuda.open = slowly
        yield setup


async def test_the_event_loop_goes_on_while_a_handle_is_opened_on_the_transports_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bench(monkeypatch) as setup:
        shaking = setup.shake()
        await eventually(lambda: setup.opening.may_go_on)  # seen by the event loop, which nobody holds up
        assert not shaking.done()
        setup.opening.may_go_on[0].set()
        assert (await asyncio.wait_for(shaking, WAIT_S)).transport == "cuda_ipc"
        assert setup.opening.threads[0].startswith("kv-cuda-ipc")
        assert setup.transport._cuda.num_opened == 1


async def test_a_handshake_that_was_begun_anew_meanwhile_makes_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever ends last: the sender goes by the answer to its last one."""
    async with bench(monkeypatch) as setup:
        first = setup.shake()
        await eventually(lambda: len(setup.opening.may_go_on) == 1)
        second = setup.shake("2" * 32)
        await asyncio.sleep(0)
        setup.opening.may_go_on[0].set()
        await eventually(lambda: len(setup.opening.may_go_on) == 2)
        setup.opening.may_go_on[1].set()
        with pytest.raises(TransferError, match="prefill-0 shook hands again meanwhile") as caught:
            await asyncio.wait_for(first, WAIT_S)
        assert caught.value.code is TransferCode.PEER_LOST
        reply = await asyncio.wait_for(second, WAIT_S)
        (pair,) = setup.receiver.agent._receiving._pairs.values()
        assert (pair.sender.incarnation, pair.token) == ("2" * 32, reply.data_token)
        await eventually(lambda: setup.transport._cuda.num_opened == 1, what="the first one's handle to be closed")


async def test_a_handle_that_nobody_waits_for_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(monkeypatch) as setup:
        attaching = asyncio.create_task(attach(setup.transport, setup.offer))
        await eventually(lambda: setup.opening.may_go_on)
        attaching.cancel()
        await asyncio.wait([attaching])
        assert attaching.cancelled()
        setup.opening.may_go_on[0].set()
        await eventually(
            lambda: setup.transport._cuda.num_opened == 0 and not setup.transport._threads._work_queue.qsize()
        )
        done = await asyncio.wrap_future(setup.transport._threads.submit(lambda: setup.transport._cuda.num_opened))
        assert done == 0


async def test_a_receiver_that_closes_while_a_handle_is_opened_refuses_and_closes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with bench(monkeypatch) as setup:
        shaking = setup.shake()
        await eventually(lambda: setup.opening.may_go_on)
        setup.receiver.agent._receiving._is_closed = True  # the first thing that closing does
        setup.opening.may_go_on[0].set()
        with pytest.raises(TransferError, match="is shutting down") as caught:
            await asyncio.wait_for(shaking, WAIT_S)
        assert caught.value.code is TransferCode.DRAINING
        await eventually(lambda: setup.transport._cuda.num_opened == 0)


async def test_memory_that_a_peer_may_have_open_outlives_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy out of it may be under way over there: the end of a handoff here does not stop that."""
    monkeypatch.setattr("helpers.kv_agents.cache_device", lambda: "cpu")
    async with running("decode-0", transports="cuda_ipc") as receiver:
        async with running("prefill-0", transports="cuda_ipc") as sender:
            sender.fill(1)
            prompt = Prompt([1, 2])
            await hand_over(sender, receiver, prompt)
            assert_arrived(sender, receiver, prompt)
            transport: Any = sender.agent._context.transports["cuda_ipc"]
            assert isinstance(transport, CudaIpcTransport)
            address = transport._address
        assert address in [tensor.data_ptr() for tensor in host_cuda.retired]
        assert not isinstance(transport._cuda, HostCuda) or not transport._cuda._allocated


class Driver:
    """The calls of CUDA's bindings that memory takes."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaStreamNonBlocking = cudaEventDisableTiming = 1

    def __init__(self) -> None:
        self.num_allocated = 0
        self.freed: list[int] = []

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, 1

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return 0, 1

    def cudaMalloc(self, num_bytes: int) -> tuple[int, int]:
        self.num_allocated += 1
        return 0, self.num_allocated << 30

    def cudaFree(self, address: int) -> tuple[int]:
        self.freed.append(address)
        return (0,)


def test_exported_memory_is_never_freed_but_used_again_for_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=driver))
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=SimpleNamespace(runtime=driver)))
    monkeypatch.setattr(cuda_runtime, "_retired", {})
    first, other = (CudaRuntime(torch.device("cuda", index)) for index in (0, 1))
    address = first.allocate(1000)
    first.retire(address, 1000)
    assert other.allocate(1000) != address  # another device's
    assert first.allocate(2000) != address  # too little
    assert first.allocate(1000) == address  # also by another runtime of the device
    assert first.allocate(1000) != address  # it is taken
    assert driver.freed == []
    first.free(address)
    assert driver.freed == [address]
