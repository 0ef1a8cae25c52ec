"""What operators ask of one worker through the gateway: its block ledger, and to drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import grpc
import grpc.aio

from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.api.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.router import Role
from baton.services.gateway.registry import KnownWorker, Registry
from baton.services.runtime import convert
from baton.services.runtime.grpc import CONTROL_TIMEOUT_S, create_channel, rpc_errors

# Beyond the time that a worker has to drain: for its answer.
_ANSWER_S = 10.0
# Beyond that time, for a worker that changes its role: its memory is laid out anew and warmed up.
_BEGIN_S = 60.0


class WorkerOperations(Protocol):
    """Raises NOT_FOUND for a worker that is not known, and what the call to it raises."""

    async def blocks(
        self, worker_id: str, *, overdue: bool, cached: bool, first: int, limit: int
    ) -> dict[str, Any]: ...

    async def drain(self, worker_id: str, timeout_s: float) -> dict[str, Any]: ...

    async def change_role(self, worker_id: str, role: Role, timeout_s: float) -> dict[str, Any]: ...


class WorkerCalls:
    """The operations on the workers of a registry. A call, a connection: they are rare."""

    def __init__(self, registry: Registry, open_channel: Callable[[str], grpc.aio.Channel] = create_channel) -> None:
        self._registry = registry
        self._open_channel = open_channel

    async def blocks(self, worker_id: str, *, overdue: bool, cached: bool, first: int, limit: int) -> dict[str, Any]:
        """A page of the worker's ledger."""
        known = self._find(worker_id)
        request = worker_pb2.GetBlocksRequest(
            overdue_only=overdue, include_cached=cached, first_block_id=first, max_num_blocks=limit
        )
        async with self._open_channel(known.link.address) as channel:
            with _worker_errors(worker_id):
                stub = worker_pb2_grpc.WorkerServiceStub(channel)
                answer = await stub.GetBlocks(request, timeout=CONTROL_TIMEOUT_S)
        next_id = answer.next_block_id if answer.HasField("next_block_id") else None
        return {"object": "list", "worker": worker_id, "data": [_row(b) for b in answer.blocks], "next": next_id}

    async def drain(self, worker_id: str, timeout_s: float) -> dict[str, Any]:
        """Waits until the worker holds nothing any more. It stays as it is until somebody ends it."""
        known = self._find(worker_id)
        timeout_ms = round(timeout_s * 1e3)
        async with self._open_channel(known.link.address) as channel:
            with _worker_errors(worker_id):
                if known.link.role is Role.PREFILL:
                    prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
                    request = prefill_pb2.DrainRequest(timeout_ms=timeout_ms)
                    num_aborted = (await prefill.Drain(request, timeout=timeout_s + _ANSWER_S)).num_aborted
                else:
                    decode = decode_pb2_grpc.DecodeServiceStub(channel)
                    asked = decode_pb2.DrainRequest(timeout_ms=timeout_ms)
                    num_aborted = (await decode.Drain(asked, timeout=timeout_s + _ANSWER_S)).num_aborted
        return {"id": worker_id, "state": "drained", "given_up": num_aborted}

    async def change_role(self, worker_id: str, role: Role, timeout_s: float) -> dict[str, Any]:
        """Waits until the worker is there again with its new role, or the time and what it takes to begin are over.

        Raises INVALID_REQUEST where no decode worker would be left: nothing could be answered meanwhile.
        """
        known = self._find(worker_id)
        if known.link.role is role:
            return {"id": worker_id, "role": role.value, "incarnation": known.link.incarnation, "state": "unchanged"}
        others = [other for other in self._registry if other is not known and other.is_usable]
        if role is Role.PREFILL and all(other.link.role is Role.PREFILL for other in others):
            message = f"no decode worker would be left without {worker_id}"
            raise BatonError(ErrorCode.INVALID_REQUEST, message, param="role")
        request = worker_pb2.ChangeRoleRequest(
            role=convert.role_to_wire(role), incarnation=known.link.incarnation, timeout_ms=round(timeout_s * 1e3)
        )
        async with self._open_channel(known.link.address) as channel:
            with _worker_errors(worker_id):
                await worker_pb2_grpc.WorkerServiceStub(channel).ChangeRole(request, timeout=CONTROL_TIMEOUT_S)
        try:
            async with asyncio.timeout(timeout_s + _BEGIN_S):
                while (now := self._registry.get(worker_id)) is None or not (now.link.role is role and now.is_usable):
                    await self._registry.wait_changed()
        except TimeoutError:
            message = f"{worker_id} is not back as a {role} worker after {timeout_s + _BEGIN_S:g} s"
            raise BatonError(ErrorCode.DEADLINE_EXCEEDED, message) from None
        return {"id": worker_id, "role": role.value, "incarnation": now.link.incarnation, "state": "changed"}

    def _find(self, worker_id: str) -> KnownWorker:
        known = self._registry.get(worker_id)
        if known is None:
            raise BatonError(ErrorCode.NOT_FOUND, f"There is no worker {worker_id[:64]!r}.", param="worker_id")
        return known


class NoWorkers:
    """The operations where there are no workers to ask."""

    async def blocks(self, worker_id: str, *, overdue: bool, cached: bool, first: int, limit: int) -> dict[str, Any]:
        raise BatonError(ErrorCode.NOT_FOUND, f"There is no worker {worker_id[:64]!r}.", param="worker_id")

    async def drain(self, worker_id: str, timeout_s: float) -> dict[str, Any]:
        raise BatonError(ErrorCode.NOT_FOUND, f"There is no worker {worker_id[:64]!r}.", param="worker_id")

    async def change_role(self, worker_id: str, role: Role, timeout_s: float) -> dict[str, Any]:
        raise BatonError(ErrorCode.NOT_FOUND, f"There is no worker {worker_id[:64]!r}.", param="worker_id")


def _row(block: worker_pb2.LedgerBlock) -> dict[str, Any]:
    deadline_in_s = block.deadline_in_s if block.HasField("deadline_in_s") else None
    return {
        "block_id": block.block_id,
        "state": block.state,
        "generation": block.generation,
        "name": block.name.hex() or None,
        "request_id": block.request_id or None,
        "attempt": block.attempt or None,
        "peer": block.peer or None,
        "phase": block.phase or None,
        "age_s": round(block.age_s, 3) if block.HasField("age_s") else None,
        "deadline_in_s": None if deadline_in_s is None else round(deadline_in_s, 3),
        "overdue": deadline_in_s is not None and deadline_in_s < 0,
    }


@contextmanager
def _worker_errors(worker_id: str) -> Iterator[None]:
    with rpc_errors(f"worker {worker_id}"):
        yield
