"""The block ledger as the worker tells it: every block with its holder, the peer at the other end, its age and deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import grpc

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.services.core.block_pool import BlockPool
from baton.services.core.block_state import BlockState, LedgerEntry
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.router import Role
from baton.services.core.scheduler.base import Scheduler
from baton.services.runtime import convert
from baton.services.worker.requests import split_scheduler_id
from baton.services.worker.worker import Worker

DEFAULT_NUM_BLOCKS = 1_000
MAX_NUM_BLOCKS = 10_000


class LedgerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """``WorkerService`` in front of a worker of either kind."""

    def __init__(
        self,
        worker: Worker[Any],
        pool: BlockPool,
        change_role: Callable[[Role, float], None] | None = None,
        block_bytes: int = 0,
    ) -> None:
        """``change_role``: how the process gives the worker another role; None: it cannot."""
        self._worker = worker
        self._pool = pool
        self._change_role = change_role
        self._block_bytes = block_bytes

    async def GetBlocks(
        self, request: worker_pb2.GetBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.GetBlocksResponse:
        if request.max_num_blocks > MAX_NUM_BLOCKS:
            message = f"max_num_blocks is {request.max_num_blocks}; it must be at most {MAX_NUM_BLOCKS}"
            raise BatonError(ErrorCode.INVALID_REQUEST, message, param="max_num_blocks")
        worker, peers = self._worker, self._worker.peers()
        blocks, next_id = await worker.steps.call(lambda scheduler: self._collect(request, scheduler, peers))
        return worker_pb2.GetBlocksResponse(worker_id=worker.identity.worker_id, blocks=blocks, next_block_id=next_id)

    async def ChangeRole(
        self, request: worker_pb2.ChangeRoleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ChangeRoleResponse:
        role = convert.role_from_wire(request.role)
        if role is None:
            raise BatonError(ErrorCode.INVALID_REQUEST, "role must be prefill, decode or colocated", param="role")
        if request.incarnation not in ("", self._worker.incarnation):
            raise BatonError(
                ErrorCode.STALE_INCARNATION,
                f"this worker is incarnation {self._worker.incarnation}, not {request.incarnation}",
            )
        if self._change_role is None:
            raise BatonError(ErrorCode.INVALID_REQUEST, "this worker cannot change its role")
        self._change_role(role, request.timeout_ms / 1e3)
        return worker_pb2.ChangeRoleResponse()

    async def GetSession(
        self, request: worker_pb2.GetSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.GetSessionResponse:
        key = convert.check_session_key(request.key)
        response: worker_pb2.GetSessionResponse = await self._worker.steps.call(lambda _: self._session(key))
        return response

    async def CloseSession(
        self, request: worker_pb2.CloseSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.CloseSessionResponse:
        key, retention = convert.check_session_key(request.key), self._pool.retention
        was_known = await self._worker.steps.call(lambda _: retention.close(key, self._worker.now_s()))
        return worker_pb2.CloseSessionResponse(was_known=was_known)

    def _session(self, key: str) -> worker_pb2.GetSessionResponse:
        now_s = self._worker.now_s()
        session = self._pool.retention.get(key, now_s)
        if session is None:
            return worker_pb2.GetSessionResponse()
        return worker_pb2.GetSessionResponse(
            is_known=True,
            num_blocks=len(session.blocks),
            num_bytes=len(session.blocks) * self._block_bytes,
            expires_in_s=session.expires_s - now_s,
        )

    def _collect(
        self, request: worker_pb2.GetBlocksRequest, scheduler: Scheduler, peers: Mapping[str, str]
    ) -> tuple[list[worker_pb2.LedgerBlock], int | None]:
        """On the step thread: nothing moves meanwhile."""
        now_s = self._worker.now_s()
        wanted = (
            entry
            for entry in self._pool.ledger(request.first_block_id)
            if (entry.state is not BlockState.CACHED or request.include_cached)
            and (not request.overdue_only or entry.is_overdue(now_s))
        )
        most = request.max_num_blocks or DEFAULT_NUM_BLOCKS
        taken = list(islice(wanted, most))
        following = next(wanted, None)
        blocks = [_block(entry, scheduler, peers, now_s) for entry in taken]
        return blocks, following.block_id if following is not None else None


def _block(entry: LedgerEntry, scheduler: Scheduler, peers: Mapping[str, str], now_s: float) -> worker_pb2.LedgerBlock:
    block = worker_pb2.LedgerBlock(
        block_id=entry.block_id, state=entry.state.value, generation=entry.generation, name=entry.name or b""
    )
    if entry.deadline_s is not None:
        block.deadline_in_s = entry.deadline_s - now_s
    if entry.since_s is not None:
        block.age_s = now_s - entry.since_s
    holder = entry.request_id or _request_of(entry.handoff)
    if holder is not None:
        block.request_id, block.attempt = split_scheduler_id(holder)
        block.peer = peers.get(holder, "")
        block.phase = scheduler.phase(holder) or "ended"
    return block


def _request_of(handoff: str | None) -> str | None:
    """The scheduler's id of a request from its transfer's, which ends with "/attempt"."""
    if handoff is None:
        return None
    return handoff.rpartition("/")[0] or handoff
