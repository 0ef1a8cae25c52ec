"""Blocks between agents of one process: by reference, copied once.

The sender announces a nonce that stands for its rows in a table of this process. A peer elsewhere finds nothing under it and
takes another transport. The copy, its batches and its checksums are those of ``shm``: what differs is only how the receiver
comes to the sender's rows.
"""

from __future__ import annotations

import secrets
from concurrent.futures import Executor
from typing import ClassVar
from weakref import WeakValueDictionary

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.memory import BlockMemory
from baton.kvtransfer.rows import Rows
from baton.kvtransfer.transport.base import Offer
from baton.kvtransfer.transport.shm import RowCopier

_rows_here: WeakValueDictionary[bytes, Rows] = WeakValueDictionary()


class InprocTransport(RowCopier):
    """Copies blocks out of memory of this very process."""

    name: ClassVar[str] = "inproc"

    def __init__(self, memory: BlockMemory, executor: Executor) -> None:
        super().__init__(memory, executor)
        self._nonce = secrets.token_bytes(16)
        _rows_here[self._nonce] = memory.rows

    def offer(self) -> bytes:
        return self._nonce

    def attach(self, offer: Offer) -> Rows:
        nonce = offer.tickets.get(self.name)
        rows = _rows_here.get(nonce) if nonce is not None else None
        if rows is None:
            raise TransferError(TransferCode.INCOMPATIBLE, "inproc: the peer is another process")
        if rows.row_bytes != self._memory.block_bytes:
            raise TransferError(
                TransferCode.INCOMPATIBLE,
                f"inproc: rows of {rows.row_bytes} bytes there, {self._memory.block_bytes} here",
            )
        return rows
