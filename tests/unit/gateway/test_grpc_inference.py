"""gRPC InferenceService on a real server: what REST does, in protobuf."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from helpers.gateway_api import MAX_MODEL_LEN, REPLY, Gateway, make_gateway
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2
from baton.api.inference.v1 import inference_pb2, inference_pb2_grpc
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.gateway.auth import Authenticator
from baton.services.gateway.generation import GenerationRequest, SloTarget
from baton.services.gateway.grpc_inference import InferenceServicer
from baton.services.gateway.limits import Limits
from baton.services.runtime.grpc import bind_server, create_server, enable_reflection, service_names

Request = inference_pb2.GenerateRequest


@asynccontextmanager
async def served(gateway: Gateway) -> AsyncIterator[tuple[Any, int]]:
    """A stub, and the port that it is connected to."""
    server = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(gateway.deps), server)
    enable_reflection(server, service_names(inference_pb2.DESCRIPTOR))
    port = bind_server(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield inference_pb2_grpc.InferenceServiceStub(channel), port
    finally:
        await server.stop(None)


@pytest.fixture
async def stub(gateway: Gateway) -> AsyncIterator[Any]:
    async with served(gateway) as (stub, _):
        yield stub


async def generate(stub: Any, request: Request, **kwargs: Any) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in stub.Generate(request, **kwargs)]


async def failure(stub: Any, request: Request, **kwargs: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await generate(stub, request, **kwargs)
    return error.value


def chat(text: str = "hello", **fields: Any) -> Request:
    return Request(chat=inference_pb2.ChatPrompt(messages=[{"role": "user", "content": text}]), **fields)


async def test_a_conversation_is_answered(stub: Any, gateway: Gateway) -> None:
    gateway.dispatcher.cached_tokens = 2
    responses = await generate(stub, chat(request_id="mine"))
    request = gateway.dispatcher.requests[0]
    assert "".join(response.text for response in responses) == REPLY
    assert {response.id for response in responses} == {"mine"}
    assert request.receipt_id == "mine"
    reasons = [response.finish_reason for response in responses]
    assert reasons == [common_pb2.FINISH_REASON_UNSPECIFIED] * (len(reasons) - 1) + [common_pb2.FINISH_REASON_STOP]
    assert [response.HasField("usage") for response in responses] == [False] * (len(reasons) - 1) + [True]
    usage, num_tokens = responses[-1].usage, len(gateway.dispatcher.encode(REPLY)) + 1
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt_token_ids), num_tokens)
    assert usage.cached_tokens == 2
    assert sum(len(response.tokens) for response in responses) == num_tokens


async def test_prompt_kinds_and_defaults(stub: Any, gateway: Gateway) -> None:
    ids = gateway.dispatcher.encode("hello world")
    await generate(stub, Request(text="hello world"))
    await generate(stub, Request(tokens=inference_pb2.TokenPrompt(token_ids=ids)))
    for request in gateway.dispatcher.requests:
        assert request.prompt_token_ids == ids
        assert request.sampling.max_tokens == MAX_MODEL_LEN - len(ids)
        assert request.sampling.temperature == 1.0


async def test_every_field_reaches_the_sampler(stub: Any, gateway: Gateway) -> None:
    request = chat(
        model="tiny", max_tokens=9, temperature=0.0, top_p=0.5, top_k=3, min_p=0.25, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, seed=-5, stop_token_ids=[7], ignore_eos=True, min_tokens=2, cache_salt="s",
    )  # fmt: skip
    await generate(stub, request)
    (sent,) = gateway.dispatcher.requests
    sampling = sent.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.0, 0.5, 3)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.25, 1.0, -1.0)
    assert (sampling.repetition_penalty, sampling.seed, sampling.min_tokens) == (1.5, 2**64 - 5, 2)
    assert (sampling.stop_token_ids, sampling.ignore_eos, sent.cache_salt) == (frozenset({7}), True, "/s")


async def test_choices_stop_and_logprobs(stub: Any) -> None:
    responses = await generate(stub, chat(n=3, stop=["brown"], logprobs=2))
    assert {response.index for response in responses} == {0, 1, 2}
    for index in range(3):
        mine = [response for response in responses if response.index == index]
        assert "".join(response.text for response in mine) == "the quick "
        assert mine[-1].finish_reason == common_pb2.FINISH_REASON_STOP
        assert all(len(token.top_logprobs) == 2 for response in mine for token in response.tokens)
    assert [response.HasField("usage") for response in responses].count(True) == 1
    assert responses[-1].HasField("usage")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Request(), "prompt"),
        (Request(text=""), "text"),
        (Request(tokens=inference_pb2.TokenPrompt()), "tokens.token_ids"),
        (Request(tokens=inference_pb2.TokenPrompt(token_ids=[10**6])), "tokens.token_ids"),
        (Request(chat=inference_pb2.ChatPrompt()), "chat.messages"),
        (Request(chat=inference_pb2.ChatPrompt(messages=[{"role": "pirate", "content": "x"}])), "chat.messages[0].role"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(temperature=3), "temperature"),
        (chat(temperature=float("nan")), "temperature"),
        (chat(repetition_penalty=float("inf")), "repetition_penalty"),
        (chat(top_p=0), "top_p"),
        (chat(n=0), "n"),
        (chat(n=1000), "n"),
        (chat(logprobs=21), "logprobs"),
        (Request(text="x", logprobs=21), "logprobs"),
        (chat(stop=[""]), "stop"),
        (chat(stop_token_ids=[10**6]), "stop_token_ids"),
        (chat(cache_salt="s" * 1025), "cache_salt"),
        (chat(request_id="a b"), "request_id"),
        (chat(request_id="x" * 129), "request_id"),
        (Request(text="fox " * 2000), "text"),
        (chat(max_tokens=MAX_MODEL_LEN), "max_tokens"),
    ],
    ids=lambda value: str(value).replace("\n", " ")[:30],
)  # fmt: skip
async def test_bad_fields_are_named(stub: Any, gateway: Gateway, request_: Request, field: str) -> None:
    error = await failure(stub, request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    violations = error_details_pb2.BadRequest()
    assert any(detail.Unpack(violations) for detail in status.details)
    assert [violation.field for violation in violations.field_violations] == [field]
    assert not gateway.dispatcher.requests
    assert len(gateway.refusals) == 1
    assert await generate(stub, chat())


async def test_context_length_is_told(stub: Any) -> None:
    error = await failure(stub, chat(max_tokens=MAX_MODEL_LEN))
    assert f"maximum context length is {MAX_MODEL_LEN} tokens" in (error.details() or "")


async def test_unknown_model(stub: Any) -> None:
    assert (await failure(stub, chat(model="other"))).code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ErrorCode.NO_WORKERS, grpc.StatusCode.UNAVAILABLE),
        (ErrorCode.OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (ErrorCode.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED),
        (ErrorCode.INTERNAL, grpc.StatusCode.INTERNAL),
    ],
)
async def test_failures_behind_the_dispatcher(
    stub: Any, gateway: Gateway, code: ErrorCode, status: grpc.StatusCode
) -> None:
    gateway.dispatcher.script = lambda request: [BatonError(code, "cause at 10.0.0.7")]
    error = await failure(stub, chat())
    assert error.code() is status
    assert "10.0.0.7" not in str(error)
    assert gateway.refusals == []  # the dispatcher counts these


async def test_the_door_is_the_same() -> None:
    gateway = make_gateway(limits=Limits(max_concurrent_requests=1))
    async with served(gateway) as (stub, _):
        with gateway.deps.door.enter():
            assert (await failure(stub, chat())).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await generate(stub, chat())
        assert gateway.deps.door.num_inside == 0


@pytest.mark.parametrize("phase", ["queued", "generating"])
async def test_a_cancelled_call_cancels_its_request(stub: Any, gateway: Gateway, phase: str) -> None:
    never = asyncio.Event()

    def script(request: GenerationRequest) -> list[Any]:
        return [never] if phase == "queued" else [*gateway.dispatcher.speak(request)[:2], never]

    gateway.dispatcher.script = script
    call = stub.Generate(chat(n=2))
    await eventually(lambda: gateway.dispatcher.running)
    if phase == "generating":
        await call.read()
    call.cancel()
    await eventually(lambda: not gateway.dispatcher.running)
    await eventually(lambda: gateway.deps.door.num_inside == 0)


async def test_the_callers_deadline_is_the_requests(stub: Any, gateway: Gateway) -> None:
    await generate(stub, chat(), timeout=20)
    timeout_s = gateway.dispatcher.requests[0].timeout_s
    assert timeout_s is not None
    assert 0 < timeout_s <= 20


async def test_slo_is_metadata(stub: Any, gateway: Gateway) -> None:
    await generate(stub, chat(), metadata=(("x-slo-ttft-ms", "250"),))
    assert gateway.dispatcher.requests[0].slo == SloTarget("standard", 250.0, None)
    error = await failure(stub, chat(), metadata=(("x-slo-ttft-ms", "soon"),))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_keys() -> None:
    gateway = make_gateway(authenticator=Authenticator(["key"]))
    async with served(gateway) as (stub, _):
        for metadata in ((), (("authorization", "Bearer no"),)):
            assert (await failure(stub, chat(), metadata=metadata)).code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await generate(stub, chat(), metadata=(("authorization", "Bearer key"),))
        assert gateway.dispatcher.requests[0].cache_salt not in ("/", "key/")


async def test_models_are_listed(stub: Any) -> None:
    models = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert [(model.id, model.max_model_len) for model in models] == [("tiny", 512), ("tiny-alias", 512)]


async def test_a_stock_client_can_call_with_reflection_alone(gateway: Gateway) -> None:
    """Everything that the client knows of the service comes from the server."""
    name = "baton.api.inference.v1.InferenceService"

    def call(port: int) -> list[dict[str, Any]]:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert name in database.get_services()
            method = DescriptorPool(database).FindServiceByName(name).FindMethodByName("Generate")
            request_class = message_factory.GetMessageClass(method.input_type)
            generate = channel.unary_stream(
                f"/{name}/Generate",
                request_serializer=request_class.SerializeToString,
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
            fields = {"chat": {"messages": [{"role": "user", "content": "hello"}]}}
            return [json_format.MessageToDict(one) for one in generate(json_format.ParseDict(fields, request_class()))]

    async with served(gateway) as (_, port):
        responses = await asyncio.to_thread(call, port)
    assert "".join(response.get("text", "") for response in responses) == REPLY
