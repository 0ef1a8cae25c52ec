"""Both ends of a fetch: the worker that asks for blocks, and the one that hands over those that it still has."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import structlog

from baton.kvtransfer import messages as m
from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.errors import Fenced, TransferCode, TransferError, Unanswered
from baton.kvtransfer.fetch import NO_TOKEN, BlockHolder, Fetch
from baton.kvtransfer.handshake import PeerClient
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.layout import BLOCK_NAME_BYTES
from baton.kvtransfer.sending import HandoffSpec, SendingSide

_log = structlog.get_logger(__name__)

# Holders whose channel is kept open; a prefill worker asks few others, again and again.
_MAX_HOLDERS = 64


class FetchDesk:
    """Lives on the event loop. ``holder`` None: this worker gives nothing away."""

    def __init__(self, context: AgentContext, sending: SendingSide, holder: BlockHolder | None) -> None:
        self._context = context
        self._sending = sending
        self._holder = holder
        self._clients: OrderedDict[WorkerIdentity, PeerClient] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    # Asking.

    async def ask(self, fetch: Fetch, address: str) -> int:
        """How many leading blocks the holder hands over; at least one. The handoff then comes by itself, and must be expected.

        ``address``: the holder's gRPC services. Raises TransferError when it has none of them, or cannot be asked.
        """
        holder = fetch.handoff.sender
        client = self._client(holder, address)
        try:
            return await client.fetch(fetch)
        except TransferError as error:
            if isinstance(error, Unanswered) or error.code is TransferCode.STALE:
                self._drop(holder)  # whoever answers there next gets a channel of its own
            raise

    def _client(self, holder: WorkerIdentity, address: str) -> PeerClient:
        for other in [known for known in self._clients if known.worker_id == holder.worker_id and known != holder]:
            self._drop(other)
        if holder not in self._clients:
            self._clients[holder] = self._context.connect(address)
        self._clients.move_to_end(holder)
        while len(self._clients) > _MAX_HOLDERS:
            self._drop(next(iter(self._clients)))
        return self._clients[holder]

    def _drop(self, holder: WorkerIdentity) -> None:
        if (client := self._clients.pop(holder, None)) is not None:
            task = asyncio.create_task(client.close(), name="kv-holder-close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # Giving.

    async def serve(self, fetch: Fetch) -> int:
        """A peer asks. Opens the handoff, and returns how many blocks it is of. Raises TransferError to refuse."""
        handoff = fetch.handoff
        if handoff.sender != self._context.identity:
            self._context.stats.fenced += 1
            raise Fenced(f"meant for {handoff.sender}, this is {self._context.identity}")
        if self._holder is None or self._is_closed:
            raise TransferError(TransferCode.DRAINING, f"{handoff.sender} gives no blocks away")
        names = fetch.block_names
        if not 0 < len(names) <= self._context.memory.num_blocks or any(len(n) != BLOCK_NAME_BYTES for n in names):
            raise TransferError(TransferCode.PROTOCOL, f"{len(names)} block names that cannot all be here")
        # First: a receiver that cannot be reached learns so from this answer, and no block waits for it.
        await self._sending.reach(handoff.receiver, fetch.receiver_address)
        block_ids = await self._holder.pin(handoff, names)
        if not block_ids:
            raise TransferError(TransferCode.EVICTED, f"{handoff.sender} has none of the {len(names)} blocks any more")
        try:
            self._give(fetch, block_ids)
        except BaseException:
            self._holder.unpin(handoff)
            raise
        return len(block_ids)

    def _give(self, fetch: Fetch, block_ids: Sequence[int]) -> None:
        handoff, holder, context = fetch.handoff, self._holder, self._context
        assert holder is not None
        if self._is_closed:
            raise TransferError(TransferCode.DRAINING, f"{handoff.sender} is shutting down")
        spec = HandoffSpec(
            request_id=handoff.key.request_id,
            attempt=handoff.key.attempt,
            receiver=handoff.receiver,
            receiver_address=fetch.receiver_address,
            block_names=fetch.block_names[: len(block_ids)],
            num_tokens=len(block_ids) * context.compatibility.layout.block_size,
            deadline_s=context.clock() + fetch.time_left_s,
            on_done=lambda error: holder.unpin(handoff),
        )
        try:
            opened = self._sending.open(spec)
        except ValueError as error:
            raise TransferError(TransferCode.PROTOCOL, str(error)) from error
        opened.blocks_ready(dict(enumerate(block_ids)))
        opened.feed(m.Finish(NO_TOKEN))

    async def close(self) -> None:
        """Nothing more is given or asked. What is under way is the sending side's to end."""
        self._is_closed = True
        for holder in list(self._clients):
            self._drop(holder)
        if self._closing:
            await asyncio.wait(self._closing)
