"""``PrefillService`` in front of a prefill worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.api.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from baton.services.prefill.handover import PrefillWorker
from baton.services.worker.host import WorkerHost
from baton.services.worker.session import serve_stream


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Errors become gRPC statuses in the server's interceptor."""

    def __init__(self, worker: PrefillWorker, host: WorkerHost[Any]) -> None:
        self._worker = worker
        self._host = host

    async def Open(
        self, request_iterator: AsyncIterator[prefill_pb2.OpenRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await serve_stream(
            self._worker,
            request_iterator,
            context,
            start=self._worker.start,
            response=lambda step: prefill_pb2.OpenResponse(step=step),
            peer_timeout_s=self._host.settings.peer_timeout_s,
        )

    async def GetStatus(
        self, request: prefill_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prefill_pb2.GetStatusResponse:
        return prefill_pb2.GetStatusResponse(status=await self._host.status())

    async def Drain(
        self, request: prefill_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prefill_pb2.DrainResponse:
        return prefill_pb2.DrainResponse(num_aborted=await self._host.drain_within(request.timeout_ms / 1e3))
