"""``baton decode``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.kvtransfer.incoming import ReceiverHost
from baton.services.decode.intake import DecodeWorker
from baton.services.decode.servicer import DecodeServicer
from baton.services.runtime import grpc as runtime_grpc
from baton.services.worker.host import WorkerHost
from baton.services.worker.parts import WorkerParts


class DecodeHost(WorkerHost[DecodeWorker]):
    """The process of a decode worker."""

    def make_worker(self, parts: WorkerParts, on_turn: Callable[[Any, float], None]) -> DecodeWorker:
        return DecodeWorker(parts, on_turn, parts.clock)

    def receiver(self, worker: DecodeWorker) -> ReceiverHost:
        return worker

    def add_servicer(self, server: grpc.aio.Server, worker: DecodeWorker) -> Sequence[str]:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker, self), server)
        return runtime_grpc.service_names(decode_pb2.DESCRIPTOR)
