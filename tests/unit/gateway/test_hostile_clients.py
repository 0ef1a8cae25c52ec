"""Clients that do not speak the protocol: others are served meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import grpc
import httpx
from helpers.gateway_api import Gateway, chat_body

from baton.api.inference.v1 import inference_pb2, inference_pb2_grpc
from baton.services.gateway.grpc_inference import InferenceServicer
from baton.services.runtime import grpc as runtime_grpc

CHAT = "/v1/chat/completions"
NUM_SLOW = 200


async def test_connections_that_never_finish_their_headers_hold_nobody_up(gateway: Gateway) -> None:
    async with gateway.server() as url, AsyncExitStack() as stack, httpx.AsyncClient(base_url=url) as client:
        address = urlsplit(url)
        for number in range(NUM_SLOW):
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            stack.push_async_callback(writer.wait_closed)
            stack.callback(writer.close)
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-slow-{number}: ".encode())
            await writer.drain()
        assert (await client.post(CHAT, json=chat_body(), timeout=60.0)).status_code == 200
        assert gateway.deps.door.num_inside == 0, "who has not asked yet takes no place"


async def test_bytes_that_are_no_http_end_their_connection_only(gateway: Gateway) -> None:
    async with gateway.server() as url, httpx.AsyncClient(base_url=url) as client:
        address = urlsplit(url)
        for data in (
            b"\x00\xff\xfe\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(data)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 30.0)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
            writer.close()
            await writer.wait_closed()
        assert (await client.post(CHAT, json=chat_body(), timeout=60.0)).status_code == 200


async def test_grpc_calls_that_make_no_sense(gateway: Gateway) -> None:
    """Random bytes, an unknown method, a message over the limit: a status each, and the next call works."""
    server = runtime_grpc.create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(gateway.deps), server)
    port = runtime_grpc.bind_server(server, "127.0.0.1", 0)
    await server.start()
    service = "/baton.api.inference.v1.InferenceService"
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def code_of(method: str, data: bytes) -> grpc.StatusCode:
                call = channel.unary_stream(f"{service}/{method}")
                try:
                    async for _ in call(data, timeout=60.0):
                        pass
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return grpc.StatusCode.OK

            assert await code_of("Nothing", b"") is grpc.StatusCode.UNIMPLEMENTED
            assert await code_of("Generate", b"\xff" * 64) in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.INTERNAL,
            )
            assert await code_of("Generate", b"") is grpc.StatusCode.INVALID_ARGUMENT
            assert await code_of("Generate", bytes(100 * 2**20)) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not gateway.dispatcher.requests
            good = inference_pb2.GenerateRequest(text="hello", max_tokens=4)
            assert await code_of("Generate", good.SerializeToString()) is grpc.StatusCode.OK
    finally:
        await server.stop(None)
