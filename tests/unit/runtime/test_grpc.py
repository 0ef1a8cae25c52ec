"""Errors cross gRPC with code, words and field; limits and ports are what we say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from helpers.waiting import eventually

from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.services.core.errors import BatonError, ConfigurationError, ErrorCode
from baton.services.runtime.grpc import (
    MAX_MESSAGE_BYTES,
    bind_server,
    create_channel,
    create_server,
    enable_reflection,
    error_from_rpc,
    rpc_errors,
    service_names,
    status_of,
)


class Worker(decode_pb2_grpc.DecodeServiceServicer):
    """Does what the test says."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.num_open = 0

    async def GetStatus(self, request: Any, context: Any) -> decode_pb2.GetStatusResponse:
        if self.error is not None:
            raise self.error
        return decode_pb2.GetStatusResponse()

    async def Open(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[decode_pb2.OpenResponse]:
        self.num_open += 1
        try:
            async for _ in requests:
                yield decode_pb2.OpenResponse()
                if self.error is not None:
                    raise self.error
        finally:
            self.num_open -= 1

    async def Drain(self, request: Any, context: Any) -> decode_pb2.DrainResponse:
        await context.abort(grpc.StatusCode.ABORTED, "as the handler said")
        raise AssertionError("abort returned")


@asynccontextmanager
async def serving(worker: Worker) -> AsyncIterator[decode_pb2_grpc.DecodeServiceStub]:
    server = create_server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(worker, server)
    enable_reflection(server, service_names(decode_pb2.DESCRIPTOR))
    port = bind_server(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with create_channel(f"127.0.0.1:{port}") as channel:
            stub = decode_pb2_grpc.DecodeServiceStub(channel)
            stub.channel = channel
            stub.port = port
            yield stub
    finally:
        await server.stop(None)


ERRORS = [
    BatonError(ErrorCode.INVALID_REQUEST, "temperature must be 0 to 2, got 3", param="temperature"),
    BatonError(ErrorCode.OVERLOADED, "1024 requests are running", retryable=True, retry_after_s=2.5),
    BatonError(ErrorCode.STALE_INCARNATION, "meant for another process", retryable=True),
    *(BatonError(code, "words") for code in ErrorCode),
]


@pytest.mark.parametrize("raised", ERRORS, ids=lambda error: error.code.value)
async def test_an_error_arrives_as_it_was_raised(raised: BatonError) -> None:
    worker = Worker()
    worker.error = raised
    async with serving(worker) as stub:
        with pytest.raises(BatonError) as caught, rpc_errors("decode-0"):
            await stub.GetStatus(decode_pb2.GetStatusRequest(), timeout=5)
    for attribute in ("code", "message", "param", "retryable", "retry_after_s"):
        assert getattr(caught.value, attribute) == getattr(raised, attribute), attribute


async def test_an_error_in_a_stream_comes_after_what_was_sent() -> None:
    worker = Worker()
    worker.error = BatonError(ErrorCode.DRAINING, "going", retryable=True)
    async with serving(worker) as stub:
        call = stub.Open()
        await call.write(decode_pb2.OpenRequest())
        assert await call.read() == decode_pb2.OpenResponse()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_from_rpc(caught.value, "w").code is ErrorCode.DRAINING


async def test_a_stock_client_finds_field_reason_and_delay_in_the_standard_details() -> None:
    worker = Worker()
    worker.error = BatonError(ErrorCode.INVALID_REQUEST, "top_p must be above 0", param="top_p", retry_after_s=1.5)
    async with serving(worker) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetStatus(decode_pb2.GetStatusRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for kind in (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
        for packed in status.details:
            message = kind()
            if packed.Unpack(message):
                found[kind.__name__] = message
    assert found["BadRequest"].field_violations[0].field == "top_p"
    assert found["ErrorInfo"].reason == "INVALID_REQUEST"
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1500


async def test_an_unforeseen_exception_is_told_to_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()
    worker.error = RuntimeError("secret path /var/x at 0xdeadbeef")
    async with serving(worker) as stub:
        for call in (stub.GetStatus(decode_pb2.GetStatusRequest(), timeout=5), _first_of(stub.Open())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert caught.value.details() == "internal error"
        worker.error = None
        await stub.GetStatus(decode_pb2.GetStatusRequest(), timeout=5)


async def _first_of(call: Any) -> None:
    await call.write(decode_pb2.OpenRequest())
    await call.read()
    await call.read()


async def test_a_status_that_the_handler_chose_itself_is_kept() -> None:
    async with serving(Worker()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Drain(decode_pb2.DrainRequest(), timeout=5)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.ABORTED, "as the handler said")


async def test_a_cancelled_stream_is_cleaned_up_at_once() -> None:
    worker = Worker()
    async with serving(worker) as stub:
        call = stub.Open()
        await call.write(decode_pb2.OpenRequest())
        await call.read()
        assert worker.num_open == 1
        call.cancel()
        await eventually(lambda: worker.num_open == 0, what="the handler's cleanup")


async def test_a_dead_peer_is_a_lost_worker() -> None:
    async with create_channel("127.0.0.1:1") as channel:
        with pytest.raises(BatonError) as caught, rpc_errors("decode-7"):
            await decode_pb2_grpc.DecodeServiceStub(channel).GetStatus(decode_pb2.GetStatusRequest(), timeout=5)
    assert caught.value.code is ErrorCode.WORKER_LOST
    assert caught.value.retryable
    assert "decode-7" in caught.value.message


async def test_a_missed_deadline_is_named() -> None:
    never = asyncio.Event()

    class Slow(Worker):
        async def GetStatus(self, request: Any, context: Any) -> decode_pb2.GetStatusResponse:
            await never.wait()
            return decode_pb2.GetStatusResponse()

    async with serving(Slow()) as stub:
        with pytest.raises(BatonError) as caught, rpc_errors("decode-0"):
            await stub.GetStatus(decode_pb2.GetStatusRequest(), timeout=0.05)
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED


async def test_large_prompts_fit_and_a_message_over_the_limit_is_refused() -> None:
    async with serving(Worker()) as stub:
        call = stub.Open()
        request = decode_pb2.OpenRequest()
        request.start.spec.token_ids.extend([151_000] * 2_000_000)  # 6 MB, over gRPC's default of 4 MiB
        await call.write(request)
        assert await call.read() == decode_pb2.OpenResponse()
        call.cancel()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{stub.port}") as careless:
            get_status = careless.unary_unary("/baton.api.decode.v1.DecodeService/GetStatus")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await get_status(bytes(MAX_MESSAGE_BYTES + 1), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_no_message_are_an_invalid_argument_and_the_next_call_is_served() -> None:
    async with serving(Worker()) as stub:
        service = "/baton.api.decode.v1.DecodeService"
        calls = [
            stub.channel.unary_unary(f"{service}/GetStatus")(b"\xff" * 9, timeout=10),
            stub.channel.stream_stream(f"{service}/Open")(iter([b"\xff" * 9]), timeout=10).read(),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "the bytes sent are not a message of this method's type"
        call = stub.Open()
        await call.write(decode_pb2.OpenRequest())
        assert await call.read() == decode_pb2.OpenResponse()
        call.cancel()


async def test_a_port_in_use_is_one_line() -> None:
    async with serving(Worker()) as stub:
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{stub.port}: the port is in use"):
            bind_server(create_server(), "127.0.0.1", stub.port)


async def test_reflection_lists_the_services_and_health_style_calls_work() -> None:
    async with serving(Worker()) as stub:
        reflection_stub = reflection_pb2_grpc.ServerReflectionStub(stub.channel)
        call = reflection_stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert "baton.api.decode.v1.DecodeService" in names


def test_every_code_has_a_status_and_long_messages_fit_into_trailers() -> None:
    for code in ErrorCode:
        status = status_of(BatonError(code, "é" * 10_000, param="p"))
        assert status.code != 0
        assert len(status.SerializeToString()) < 8192
