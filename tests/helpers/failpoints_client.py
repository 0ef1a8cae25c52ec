"""Sets the failpoints of a running process (see CONTRIBUTING.md) from tests that are no coroutines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc


def set_failpoints(address: str, rules: str) -> None:
    """Puts these rules, and only these, in force; "on": none."""
    with grpc.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.FailpointServiceStub(channel)
        stub.SetFailpoints(worker_pb2.SetFailpointsRequest(failpoints=rules), timeout=30.0)


@contextmanager
def failpoints(address: str, rules: str) -> Iterator[None]:
    """The rules are in force until the end of the block."""
    set_failpoints(address, rules)
    try:
        yield
    finally:
        set_failpoints(address, "on")
