"""What workers keep of a conversation. They alone know: every gateway asks all of them, so that any gateway can be asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.registry import KnownWorker, Registry
from baton.services.runtime.grpc import CONTROL_TIMEOUT_S, create_channel, error_from_rpc

T = TypeVar("T")

_ASK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """What one worker keeps of one conversation."""

    worker_id: str
    num_blocks: int
    num_bytes: int
    expires_in_s: float


class SessionOperations(Protocol):
    """``key`` is what workers call the conversation."""

    async def get(self, key: str) -> list[KeptBlocks]:
        """By worker; empty where nobody knows the conversation. Raises where one did not answer, and no other knows it."""
        ...

    async def close(self, key: str) -> bool:
        """Whether anybody knew it. Raises WORKER_LOST where a worker has not heard that it is over: it may keep blocks."""
        ...


class SessionCalls:
    """The operations on the workers of a registry. A call, a connection: they are rare beside requests."""

    def __init__(self, registry: Registry, open_channel: Callable[[str], grpc.aio.Channel] = create_channel) -> None:
        self._registry = registry
        self._open_channel = open_channel

    async def get(self, key: str) -> list[KeptBlocks]:
        async def ask(known: KnownWorker) -> KeptBlocks | None:
            async with self._open_channel(known.link.address) as channel:
                stub = worker_pb2_grpc.WorkerServiceStub(channel)
                answer = await stub.GetSession(worker_pb2.GetSessionRequest(key=key), timeout=CONTROL_TIMEOUT_S)
            if not answer.is_known:
                return None
            return KeptBlocks(known.link.worker_id, answer.num_blocks, answer.num_bytes, answer.expires_in_s)

        told, failures = await self._ask_all(ask)
        if failures and not told:
            raise next(iter(failures.values()))
        return told

    async def close(self, key: str) -> bool:
        async def ask(known: KnownWorker) -> bool | None:
            async with self._open_channel(known.link.address) as channel:
                stub = worker_pb2_grpc.WorkerServiceStub(channel)
                answer = await stub.CloseSession(worker_pb2.CloseSessionRequest(key=key), timeout=CONTROL_TIMEOUT_S)
            return answer.was_known or None

        told, failures = await self._ask_all(ask)
        # One that cannot be reached may be there again with all that it kept.
        unheard = [*failures, *(known.link.worker_id for known in self._registry if not known.link.is_connected)]
        if unheard:
            message = f"these workers have not heard that the session is over: {', '.join(unheard)}"
            raise BatonError(ErrorCode.WORKER_LOST, message, retryable=True, retry_after_s=_ASK_AGAIN_S)
        return bool(told)

    async def _ask_all(
        self, ask: Callable[[KnownWorker], Coroutine[None, None, T | None]]
    ) -> tuple[list[T], dict[str, BatonError]]:
        """What those who know something said, and who failed to answer. A worker of an earlier release knows nothing."""
        workers = [known for known in self._registry if known.link.is_connected]
        answers = await asyncio.gather(*map(ask, workers), return_exceptions=True)
        told: list[T] = []
        failures: dict[str, BatonError] = {}
        for known, answer in zip(workers, answers, strict=True):
            if isinstance(answer, grpc.aio.AioRpcError):
                if answer.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    failures[known.link.worker_id] = error_from_rpc(answer, f"worker {known.link.worker_id}")
            elif isinstance(answer, BaseException):
                raise answer
            elif answer is not None:
                told.append(answer)
        return told, failures


class NoSessions:
    """The operations where there are no workers to ask."""

    async def get(self, key: str) -> list[KeptBlocks]:
        return []

    async def close(self, key: str) -> bool:
        return False
