"""Sets the failpoints of a running process (see CONTRIBUTING.md), over its own gRPC port."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.services.runtime.grpc import create_channel

if TYPE_CHECKING:
    from chaos.cluster import ChaosCluster


async def set_failpoints(cluster: ChaosCluster, name: str, rules: str) -> dict[str, int]:
    """Puts these rules, and only these, in force ("on": none). Returns how often the points before were reached."""
    async with create_channel(cluster.direct_address(name)) as channel:
        stub = worker_pb2_grpc.FailpointServiceStub(channel)
        request = worker_pb2.SetFailpointsRequest(failpoints=rules)
        return dict((await stub.SetFailpoints(request, timeout=10.0)).num_reached)
