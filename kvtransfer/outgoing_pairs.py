"""The receivers that a worker hands blocks to."""

from __future__ import annotations

import asyncio

import structlog

from baton.kvtransfer.context import AgentContext
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.linking import Linker
from baton.kvtransfer.outgoing_pair import OutgoingPair

_log = structlog.get_logger(__name__)


class OutgoingPairs:
    """Pairs by receiver process, made when first needed. A failed handshake is not remembered."""

    def __init__(self, context: AgentContext) -> None:
        self._context = context
        self._pairs: dict[WorkerIdentity, asyncio.Task[OutgoingPair]] = {}
        self._linker = Linker(context)
        self._closing: set[asyncio.Task[None]] = set()

    async def get(self, receiver: WorkerIdentity, address: str) -> OutgoingPair:
        """The pair with ``receiver``, whose gRPC services are at ``address``. Raises TransferError."""
        task = self._pairs.get(receiver)
        if task is not None and self._could_be_better(task):
            task.result().discard()
            task = None
        if task is None or _is_spent(task):
            task = asyncio.create_task(self._make(receiver, address), name="kv-handshake")
            self._pairs[receiver] = task
        return await asyncio.shield(task)

    def has(self, receiver: WorkerIdentity) -> bool:
        """There is a pair with it already."""
        task = self._pairs.get(receiver)
        return task is not None and task.done() and not _is_spent(task)

    async def _make(self, receiver: WorkerIdentity, address: str) -> OutgoingPair:
        client = self._context.connect(address)
        pair = OutgoingPair(self._context, receiver, client, self._linker, self._discard)
        try:
            await pair.connect()
        except BaseException:
            await client.close()
            raise
        _log.info("kv_pair_made", receiver=str(receiver), transport=pair.transport.name)
        self._retire_others(receiver)
        return pair

    def _could_be_better(self, task: asyncio.Task[OutgoingPair]) -> bool:
        """Nothing is under way, and a better transport, which failed a while ago, may be tried again."""
        if not task.done() or _is_spent(task) or not task.result().is_idle:
            return False
        pair = task.result()
        failed = {entry.partition(":")[0] for entry in pair.report.failed}
        return not failed.isdisjoint(self._linker.candidates(pair.receiver))

    def _retire_others(self, receiver: WorkerIdentity) -> None:
        """Forgets whatever ran as the same worker before: the new process has just answered."""
        for other in list(self._pairs):
            if other.worker_id == receiver.worker_id and other != receiver:
                task = self._pairs.pop(other)
                if task.done() and not _is_spent(task):
                    task.result().lose(TransferCode.STALE, f"{other} was replaced by {receiver}")
                    task.result().discard()

    def _discard(self, pair: OutgoingPair) -> None:
        task = self._pairs.get(pair.receiver)
        if (
            task is not None
            and task.done()
            and not task.cancelled()
            and task.exception() is None
            and task.result() is pair
        ):
            del self._pairs[pair.receiver]
        closing = asyncio.create_task(pair.close(), name="kv-pair-close")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for task in self._pairs.values():
            if not task.done():
                task.cancel()
        tasks = list(self._pairs.values())
        self._pairs.clear()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, OutgoingPair):
                await result.close()
        if self._closing:
            await asyncio.wait(self._closing)


def _is_spent(task: asyncio.Task[OutgoingPair]) -> bool:
    """It failed, or what it made is closed."""
    return task.done() and (task.cancelled() or task.exception() is not None or task.result().is_closed)
