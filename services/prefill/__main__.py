"""``baton prefill``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from baton.api.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from baton.kvtransfer.incoming import ReceiverHost
from baton.services.prefill.handover import PrefillWorker
from baton.services.prefill.servicer import PrefillServicer
from baton.services.runtime import grpc as runtime_grpc
from baton.services.worker.host import WorkerHost
from baton.services.worker.parts import WorkerParts


class PrefillHost(WorkerHost[PrefillWorker]):
    """The process of a prefill worker."""

    def make_worker(self, parts: WorkerParts, on_turn: Callable[[Any, float], None]) -> PrefillWorker:
        return PrefillWorker(parts, on_turn, parts.clock)

    def receiver(self, worker: PrefillWorker) -> ReceiverHost:
        return worker.fetcher

    def add_servicer(self, server: grpc.aio.Server, worker: PrefillWorker) -> Sequence[str]:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(worker, self), server)
        return runtime_grpc.service_names(prefill_pb2.DESCRIPTOR)
