"""Blocks by NIXL (UCX): the receiver reads the sender's rows, one-sided, over RDMA, shared memory or TCP.

Reading, not writing: nothing can land here that this side has not begun itself, after the grant was checked; the sender needs
to know no address of ours, and what was begun is over when this side sees it end. A read that does not end keeps its handoff
in quarantine, as long as it takes.

What the sender announces is numbers (address and length of its rows) and NIXL's own description of the agent, bytes that its
library parses; descriptors are made here from the checked numbers. NIXL's Python wrapper can pickle descriptors: that part is
never used.
"""

from __future__ import annotations

import os
import struct
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import structlog

from baton.kvtransfer.crew import shared_checksums
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.transport.base import Arrival, Landed, Offer, Source
from baton.kvtransfer.transport.shm import RowCopier

_log = structlog.get_logger(__name__)

_OFFER = struct.Struct(
    "<8s32sQQQ"
)  # magic, agent's name, address of the first row, rows, bytes of one; NIXL's bytes follow
_MAGIC = b"BATONNX1"
_MAX_ROWS = 2**32
# A read that has not ended after this is asked to stop.
_STALL_S = 10.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 20e-6, 2e-3
_NUM_THREADS = 2


class NixlTransport(RowCopier):
    """Reads blocks out of registered memory of a peer on any host."""

    name: ClassVar[str] = "nixl"
    waits_for_peer: ClassVar[bool] = True

    def __init__(self, memory: BlockMemory, executor: Executor) -> None:
        # Threads of its own: a read that hangs must not hold up other transports.
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="kv-nixl")
        super().__init__(memory, self._threads, executor)
        self.attaching = self._threads
        self._lock = threading.Lock()  # NIXL's agent is used by one thread at a time
        self._name = uuid.uuid4().hex
        self._agent = _make_agent(self._name)
        rows = memory.rows
        self._registered = self._agent.register_memory([(rows.address, rows.num_rows * rows.row_bytes, 0, "")], "DRAM")
        self._local = self._agent.prep_xfer_dlist("", _descriptors(rows.address, rows.num_rows, rows.row_bytes), "DRAM")
        self._remotes: dict[str, _Remote] = {}
        metadata: bytes = self._agent.get_agent_metadata()
        self._offer = _OFFER.pack(_MAGIC, self._name.encode(), rows.address, rows.num_rows, rows.row_bytes) + metadata

    def offer(self) -> bytes:
        return self._offer

    def attach(self, offer: Offer) -> _Remote:
        ticket = offer.tickets.get(self.name)
        if ticket is None:
            raise _refused("the peer does not say where its memory is")
        name, address, num_rows = self._parse(ticket)
        if name == self._name:
            raise _refused("the peer is this very worker")
        with self._lock:
            known = self._remotes.get(name)
            if known is not None:  # the same process shakes hands again
                if known.ticket != ticket:
                    raise _refused("another peer has that name")
                known.num_pairs += 1
                return known
            remote = self._remotes[name] = self._load(name, ticket, address, num_rows)
            return remote

    def detach(self, source: Source) -> None:
        remote = cast(_Remote, source)
        with self._lock:
            remote.num_pairs -= 1
            self._forget_unused(remote)

    async def close(self) -> None:
        await super().close()
        self._threads.shutdown()
        with self._lock:
            for remote in list(self._remotes.values()):
                remote.num_pairs = 0
                self._forget_unused(remote)
            self._agent.release_dlist_handle(self._local)
            self._agent.deregister_memory(self._registered)

    def _parse(self, ticket: bytes) -> tuple[str, int, int]:
        """Name, address and number of rows. Raises TransferError for what is not an offer of rows like ours."""
        if len(ticket) <= _OFFER.size:
            raise _refused(f"an offer of {len(ticket)} bytes")
        magic, name, address, num_rows, row_bytes = _OFFER.unpack_from(ticket)
        if magic != _MAGIC:
            raise _refused("an offer of another version")
        if row_bytes != self._memory.block_bytes:
            raise _refused(f"rows of {row_bytes} bytes there, {self._memory.block_bytes} here")
        if not 0 < num_rows < _MAX_ROWS or address + num_rows * row_bytes >= 2**64:
            raise _refused(f"{num_rows} rows at {address:#x}")
        return name.decode("ascii", errors="replace"), address, num_rows

    def _load(self, name: str, ticket: bytes, address: int, num_rows: int) -> _Remote:
        try:
            loaded = self._agent.add_remote_agent(ticket[_OFFER.size :])
        except Exception as error:  # the library's own, of any kind
            raise _refused(f"the peer cannot be reached: {error}") from error
        if (loaded.decode() if isinstance(loaded, bytes) else loaded) != name:
            self._agent.remove_remote_agent(loaded)
            raise _refused("the peer announces another agent than its own")
        try:
            descriptors = _descriptors(address, num_rows, self._memory.block_bytes)
            handle = self._agent.prep_xfer_dlist(loaded, descriptors, "DRAM")
        except Exception as error:  # for example rows outside what it has registered
            self._agent.remove_remote_agent(loaded)
            raise _refused(f"the peer's rows cannot be read: {error}") from error
        return _Remote(num_rows, loaded, ticket, handle)

    def _forget_unused(self, remote: _Remote) -> None:
        name = remote.ticket[8:40].decode("ascii", errors="replace")
        if remote.num_pairs <= 0 and remote.num_reads == 0 and self._remotes.get(name) is remote:
            del self._remotes[name]
            try:
                self._agent.release_dlist_handle(remote.handle)
                self._agent.remove_remote_agent(remote.name)
            except Exception as error:
                _log.warning("kv_nixl_forget_failed", reason=str(error))

    # On a thread.

    def _copy(self, arrival: Arrival, rows: Sequence[int]) -> Landed:
        try:
            return super()._copy(arrival, rows)
        except _ReadFailed as error:
            # Told as corrupt, so that the sender hears of it at once and takes another transport.
            _log.warning("kv_nixl_read_failed", num_blocks=len(rows), reason=str(error))
            return Landed(corrupt=tuple(arrival.allowed))

    def _fetch(self, source: Source, source_rows: Sequence[int], rows: Sequence[int]) -> list[int]:
        remote = cast(_Remote, source)
        with self._lock:
            remote.num_reads += 1
        try:
            self._read(remote, source_rows, rows)
        finally:
            with self._lock:
                remote.num_reads -= 1
                self._forget_unused(remote)
        return shared_checksums(self._crew, self._memory.rows, rows)

    def _read(self, remote: _Remote, source_rows: Sequence[int], rows: Sequence[int]) -> None:
        """Returns when the rows are here. Raises _ReadFailed when they are not and no byte of them can come any more."""
        try:
            with self._lock:
                handle = self._agent.make_prepped_xfer(
                    "READ", self._local, list(rows), remote.handle, list(source_rows)
                )
                state = self._agent.transfer(handle)
        except Exception as error:
            raise _ReadFailed(str(error)) from error
        started_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while state == "PROC" and time.monotonic() - started_s < _STALL_S:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            state = self._state(handle)
        self._release(handle)
        if state != "DONE":
            raise _ReadFailed(f"no end within {_STALL_S:g} s" if state == "PROC" else "the read failed")

    def _state(self, handle: Any) -> str:
        try:
            with self._lock:
                return cast(str, self._agent.check_xfer_state(handle))
        except Exception as error:
            _log.warning("kv_nixl_state_failed", reason=str(error))
            return "ERR"

    def _release(self, handle: Any) -> None:
        """Lets go of a read; one that is under way is asked to stop, again and again until it has."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                with self._lock:
                    self._agent.release_xfer_handle(handle)
                return
            except Exception as error:  # it says so while the read cannot be stopped yet
                _log.warning("kv_nixl_release_failed", reason=str(error))
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)


@dataclass(eq=False)
class _Remote:
    """A peer's rows."""

    num_rows: int
    name: str  # of its agent, as the library gave it
    ticket: bytes
    handle: Any  # its rows, prepared
    num_pairs: int = 1
    num_reads: int = 0


class _ReadFailed(Exception):
    """Nothing of it can land any more."""


def _make_agent(name: str) -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.setdefault("UCX_HANDLE_ERRORS", "none")  # signals are the process's own
    try:
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise _refused(f"it is not installed ({error}): pip install 'baton-llm[nixl]'") from error
    try:
        return nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    except Exception as error:
        raise _refused(f"it does not start here: {error}") from error


def _descriptors(address: int, num_rows: int, row_bytes: int) -> Any:
    """[num_rows, 3]: address, length and device of each row."""
    descriptors = np.zeros((num_rows, 3), dtype=np.uint64)
    descriptors[:, 0] = np.uint64(address) + np.arange(num_rows, dtype=np.uint64) * np.uint64(row_bytes)
    descriptors[:, 1] = row_bytes
    return descriptors


def _refused(reason: str) -> TransferError:
    return TransferError(TransferCode.INCOMPATIBLE, f"nixl: {reason}")
