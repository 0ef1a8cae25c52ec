"""Readiness follows the process; draining is final; watchers are told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.waiting import eventually

from baton.services.runtime.grpc import bind_server, create_channel, create_server
from baton.services.runtime.health import READY_SERVICE, Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@asynccontextmanager
async def probing(health: Health) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    server = create_server()
    health.add_to(server)
    port = bind_server(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with create_channel(f"127.0.0.1:{port}") as channel:
            yield health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(None)


async def check(stub: health_pb2_grpc.HealthStub, service: str) -> int:
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return int(answer.status)


async def test_the_life_of_a_process_as_probes_see_it() -> None:
    health = Health()
    async with probing(health) as stub:
        assert (await check(stub, ""), await check(stub, READY_SERVICE)) == (SERVING, NOT_SERVING)
        assert health.reason == "starting"
        health.set_ready()
        assert (await check(stub, ""), await check(stub, READY_SERVICE)) == (SERVING, SERVING)
        assert health.reason == ""
        health.set_not_ready("no workers")
        assert await check(stub, READY_SERVICE) == NOT_SERVING
        health.set_draining()
        health.set_ready()
        assert not health.is_ready
        assert health.reason == "draining"
        assert (await check(stub, ""), await check(stub, READY_SERVICE)) == (SERVING, NOT_SERVING)
        health.set_dead("step loop stopped")
        assert await check(stub, "") == NOT_SERVING
        assert health.reason == "step loop stopped"


async def test_an_unknown_service_is_not_found() -> None:
    async with probing(Health()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(stub, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watchers_are_told_of_changes() -> None:
    health = Health()
    async with probing(health) as stub:
        call = stub.Watch(health_pb2.HealthCheckRequest(service=READY_SERVICE), timeout=10)
        assert (await call.read()).status == NOT_SERVING
        health.set_ready()
        assert (await call.read()).status == SERVING
        health.set_draining()
        assert (await call.read()).status == NOT_SERVING
        call.cancel()
        await eventually(call.done)
