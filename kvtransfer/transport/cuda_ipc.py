"""Blocks between GPUs of one host: the receiver opens the sender's device memory and copies out of it, without the network.

What goes out stands in rows of device memory beside the cache (the mirror of the staging rows), which a CUDA IPC handle lets
another process open. The receiver copies a row into a device row of its own, on a stream of its own, waits until it is there,
and brings it to the host for the checksum of that copy; only then it goes from the device row into the cache. So nothing is
written to a block that was not verified, and what a sender did too early is caught like any other corruption.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, cast

import structlog

from baton.kvtransfer.crew import shared_checksums
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.mapping import host_id
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.rows import runs
from baton.kvtransfer.staging import StagedBlockMemory
from baton.kvtransfer.transport import cuda_runtime
from baton.kvtransfer.transport.base import Arrival, Landed, Offer, Source
from baton.kvtransfer.transport.cuda_runtime import HANDLE_BYTES, CudaError
from baton.kvtransfer.transport.shm import RowCopier

_log = structlog.get_logger(__name__)

_OFFER = struct.Struct(f"<8sQQQ{HANDLE_BYTES}s")  # magic, process id, rows, bytes of one, CUDA's handle
_MAGIC = b"BATONCI1"
_MAX_ROWS = 2**32

# A process cannot open its own handles: agents of one process find each other's memory here.
_addresses_here: dict[bytes, int] = {}


class CudaIpcTransport(RowCopier):
    """Copies blocks out of the device memory of a peer on this host."""

    name: ClassVar[str] = "cuda_ipc"
    waits_for_peer: ClassVar[bool] = True

    def __init__(self, memory: BlockMemory, executor: Executor) -> None:
        if not isinstance(memory, StagedBlockMemory):
            raise _refused("the KV cache is not in a GPU's memory")
        self._staging = memory
        num_bytes = memory.rows.num_rows * memory.block_bytes
        try:
            self._cuda = cuda_runtime.open_runtime(memory.device)
            self._address = self._cuda.allocate(num_bytes)
            handle = self._export()
        except ImportError as error:
            raise _refused(f"it is not installed ({error}): pip install 'baton-llm[cuda-ipc]'") from error
        except CudaError as error:
            raise _refused(str(error)) from error
        memory.mirror(self._cuda.tensor(self._address, num_bytes))
        # A thread of its own: a copy that hangs must not hold up other transports, and a stream has one user.
        self._threads = ThreadPoolExecutor(1, "kv-cuda-ipc", self._cuda.bind_thread)
        super().__init__(memory, self._threads, executor)
        self.attaching = self._threads
        self._lock = threading.Lock()
        _addresses_here[handle] = self._address
        self._handle = handle
        self._offer = _OFFER.pack(_MAGIC, os.getpid(), memory.rows.num_rows, memory.block_bytes, handle)

    def offer(self) -> bytes:
        return self._offer

    def attach(self, offer: Offer) -> _PeerRows:
        if not offer.host_id or offer.host_id != host_id():
            raise _refused(f"host {offer.host_id!r} there, {host_id()!r} here")
        ticket = offer.tickets.get(self.name)
        if ticket is None:
            raise _refused("the peer does not say where its memory is")
        pid, num_rows, handle = self._parse(ticket)
        if pid == os.getpid():
            if handle not in _addresses_here:
                raise _refused("no memory of this process has that handle")
            return _PeerRows(num_rows, _addresses_here[handle], is_opened=False)
        try:
            return _PeerRows(num_rows, self._cuda.open(handle), is_opened=True)
        except CudaError as error:
            raise _refused(f"the peer's memory cannot be opened: {error}") from error

    def detach(self, source: Source) -> None:
        peer = cast(_PeerRows, source)
        with self._lock:
            peer.is_detached = True
            self._close_unused(peer)

    async def close(self) -> None:
        await super().close()
        self._threads.shutdown()
        _addresses_here.pop(self._handle, None)
        self._staging.mirror(None)
        # A peer may still be reading: that its handoff was given up here does not end a copy there.
        self._cuda.retire(self._address, self._memory.rows.num_rows * self._memory.block_bytes)

    def _export(self) -> bytes:
        """The handle of our rows. Memory that cannot be exported is of no use."""
        try:
            return self._cuda.export(self._address)
        except CudaError:
            self._cuda.free(self._address)
            raise

    def _parse(self, ticket: bytes) -> tuple[int, int, bytes]:
        """Process, number of rows, handle. Raises TransferError for what is not an offer of rows like ours."""
        if len(ticket) != _OFFER.size:
            raise _refused(f"an offer of {len(ticket)} bytes, not {_OFFER.size}")
        magic, pid, num_rows, row_bytes, handle = _OFFER.unpack(ticket)
        if magic != _MAGIC:
            raise _refused("an offer of another version")
        if row_bytes != self._memory.block_bytes:
            raise _refused(f"rows of {row_bytes} bytes there, {self._memory.block_bytes} here")
        if not 0 < num_rows < _MAX_ROWS:
            raise _refused(f"{num_rows} rows")
        return pid, num_rows, handle

    def _close_unused(self, peer: _PeerRows) -> None:
        if peer.is_detached and not peer.num_reads and peer.is_opened:
            peer.is_opened = False
            try:
                self._cuda.close(peer.address)
            except CudaError as error:
                _log.warning("kv_cuda_ipc_close_failed", reason=str(error))

    # On the thread.

    def _copy(self, arrival: Arrival, rows: Sequence[int]) -> Landed:
        try:
            return super()._copy(arrival, rows)
        except CudaError as error:
            # Told as corrupt, so that the sender hears of it at once and takes another transport.
            _log.warning("kv_cuda_ipc_copy_failed", num_blocks=len(rows), reason=str(error))
            return Landed(corrupt=tuple(arrival.allowed))

    def _fetch(self, source: Source, source_rows: Sequence[int], rows: Sequence[int]) -> list[int]:
        peer, size, host = cast(_PeerRows, source), self._memory.block_bytes, self._memory.rows
        with self._lock:
            peer.num_reads += 1
        try:
            pairs = list(zip(source_rows, rows, strict=True))
            for from_row, to_row, count in runs(pairs, max(1, len(pairs))):
                ours = self._address + to_row * size
                self._cuda.copy(ours, peer.address + from_row * size, count * size)
                self._cuda.copy(host.address + to_row * size, ours, count * size)
            self._cuda.wait()
        finally:
            with self._lock:
                peer.num_reads -= 1
                self._close_unused(peer)
        return shared_checksums(self._crew, host, rows)

    def _store(self, rows: Sequence[int], block_ids: Sequence[int]) -> None:
        self._staging.store_mirrored(rows, block_ids)


@dataclass(eq=False)
class _PeerRows:
    """A peer's rows in device memory."""

    num_rows: int
    address: int
    is_opened: bool  # by a handle, which has to be closed
    num_reads: int = 0
    is_detached: bool = False


def _refused(reason: str) -> TransferError:
    return TransferError(TransferCode.INCOMPATIBLE, f"cuda_ipc: {reason}")
