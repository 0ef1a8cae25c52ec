"""A gateway's stream: one message however many steps, and ends that give everything up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.runtime.token_columns import TokenRow, rows_of
from baton.services.worker.session import PlainTokens, Session, serve_stream

GATEWAY = pb.WorkerIdentity(worker_id="g", incarnation="1")


def output(request_id: str, first_index: int, *token_ids: int, **fields: Any) -> pb.RequestOutput:
    tokens = [pb.Token(token_id=token_id) for token_id in token_ids]
    return pb.RequestOutput(request_id=request_id, attempt=1, first_index=first_index, tokens=tokens, **fields)


async def test_steps_that_a_slow_reader_missed_are_one_message() -> None:
    session = Session(GATEWAY)
    session.send([output("a", 0, 10), output("b", 5, 50)])
    session.send([output("a", 1, 11, 12)])
    session.send([output("a", 3, finish_reason=pb.FINISH_REASON_STOP, stop_token_id=12), output("c", 0, 1)])
    step = await session.next_step()
    assert [(o.request_id, o.first_index, [t.token_id for t in o.tokens]) for o in step.outputs] == [
        ("a", 0, [10, 11, 12]),
        ("b", 5, [50]),
        ("c", 0, [1]),
    ]
    assert (step.outputs[0].finish_reason, step.outputs[0].stop_token_id) == (pb.FINISH_REASON_STOP, 12)


async def test_a_report_without_tokens_takes_the_place_of_those_that_follow() -> None:
    session = Session(GATEWAY)
    session.send([output("a", 0, transfer=pb.TransferReport(num_blocks=3))])
    session.send([output("a", 1, 11)])
    (joined,) = (await session.next_step()).outputs
    assert (joined.first_index, len(joined.tokens), joined.transfer.num_blocks) == (1, 1, 3)


def plain(handle: int, first_index: int, *token_ids: int) -> PlainTokens:
    return PlainTokens(f"r{handle}", 1, TokenRow(handle, first_index, list(token_ids)))


async def test_tokens_alone_leave_in_columns_however_many_steps_they_are_of() -> None:
    session = Session(GATEWAY)
    session.send([plain(1, 4, 40), plain(2, 7, 70)])
    (one,) = [await session.next_step()]
    assert (list(one.tokens.handles), list(one.tokens.counts), one.outputs) == ([1, 2], [], [])
    session.send([plain(1, 5, 50), plain(2, 8, 80)])
    session.send([plain(1, 6, 60, 61), plain(3, 1, 10)])
    step = await session.next_step()
    assert rows_of(step.tokens) == [TokenRow(1, 5, [50, 60, 61]), TokenRow(2, 8, [80]), TokenRow(3, 1, [10])]
    assert not step.outputs


async def test_what_is_said_behind_tokens_of_an_earlier_step_comes_behind_them() -> None:
    session = Session(GATEWAY)
    session.send([plain(1, 4, 40)])
    session.send([output("r1", 5, 50, finish_reason=pb.FINISH_REASON_LENGTH)])
    step = await session.next_step()
    assert rows_of(step.tokens) == [TokenRow(1, 4, [40])]
    assert [(o.first_index, [t.token_id for t in o.tokens]) for o in step.outputs] == [(5, [50])]


async def test_tokens_behind_an_output_are_added_to_it() -> None:
    session = Session(GATEWAY)
    session.send([output("r1", 0, 1, prefill=pb.PrefillReport()), output("r2", 0, transfer=pb.TransferReport())])
    session.send([plain(1, 1, 2, 3), plain(2, 6, 60)])
    step = await session.next_step()
    assert not step.HasField("tokens")
    assert [(o.first_index, [t.token_id for t in o.tokens]) for o in step.outputs] == [(0, [1, 2, 3]), (6, [60])]


async def test_attempts_are_never_joined() -> None:
    session = Session(GATEWAY)
    session.send([pb.RequestOutput(request_id="a", attempt=1, finish_reason=pb.FINISH_REASON_ERROR)])
    session.send([pb.RequestOutput(request_id="a", attempt=2, tokens=[pb.Token(token_id=1)])])
    assert [o.attempt for o in (await session.next_step()).outputs] == [1, 2]


class Host:
    incarnation = "mine"

    def __init__(self) -> None:
        self.opened: list[Session] = []
        self.closed: list[Session] = []
        self.cancelled: list[tuple[str, int]] = []

    def open_session(self, gateway: pb.WorkerIdentity) -> Session:
        self.opened.append(Session(gateway))
        return self.opened[-1]

    def close_session(self, session: Session) -> None:
        self.closed.append(session)

    def cancel(self, session: Session, request_id: str, attempt: int) -> None:
        self.cancelled.append((request_id, attempt))


class Context:
    """Collects what was written."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.is_accepted = False

    async def send_initial_metadata(self, metadata: object) -> None:
        self.is_accepted = True

    async def write(self, message: Any) -> None:
        self.written.append(message)


async def commands(*messages: decode_pb2.OpenRequest) -> AsyncIterator[decode_pb2.OpenRequest]:
    for message in messages:
        yield message
        await asyncio.sleep(0)


def hello(incarnation: str = "mine") -> decode_pb2.OpenRequest:
    return decode_pb2.OpenRequest(hello=decode_pb2.Hello(gateway=GATEWAY, worker_incarnation=incarnation))


START = decode_pb2.OpenRequest(start=decode_pb2.Start(spec=pb.GenerationSpec(request_id="r", attempt=1)))
CANCEL = decode_pb2.OpenRequest(cancel=decode_pb2.Cancel(request_id="r", attempt=1))


async def serve(host: Host, context: Context, *messages: decode_pb2.OpenRequest) -> None:
    def start(session: Session, command: decode_pb2.Start) -> None:
        session.send([output(command.spec.request_id, 0, 7)])

    stream: Any = context
    await serve_stream(
        host, commands(*messages), stream, start=start, response=lambda step: decode_pb2.OpenResponse(step=step)
    )


async def test_a_stream_takes_commands_and_closes_its_session_at_the_end() -> None:
    host, context = Host(), Context()
    await serve(host, context, hello(), START, CANCEL)
    assert context.is_accepted
    assert [message.step.outputs[0].request_id for message in context.written] == ["r"]
    assert host.cancelled == [("r", 1)]
    assert host.closed == host.opened != []


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ((), ErrorCode.INVALID_REQUEST),
        ((START,), ErrorCode.INVALID_REQUEST),
        ((decode_pb2.OpenRequest(),), ErrorCode.INVALID_REQUEST),
        ((hello("another"),), ErrorCode.STALE_INCARNATION),
    ],
)
async def test_a_stream_that_begins_wrongly_is_refused(
    messages: tuple[decode_pb2.OpenRequest, ...], code: ErrorCode
) -> None:
    host, context = Host(), Context()
    with pytest.raises(BatonError) as failure:
        await serve(host, context, *messages)
    assert failure.value.code is code
    assert not host.opened
    assert not context.is_accepted


async def test_a_second_hello_ends_the_stream_and_gives_its_requests_up() -> None:
    host = Host()
    with pytest.raises(BatonError, match="unexpected hello"):
        await serve(host, Context(), hello(), START, hello())
    assert host.closed == host.opened != []


class Gateway:
    """Commands that come when the test says."""

    def __init__(self, heartbeat_ms: int) -> None:
        self.commands: asyncio.Queue[decode_pb2.OpenRequest] = asyncio.Queue()
        first = hello()
        first.hello.heartbeat_ms = heartbeat_ms
        self.commands.put_nowait(first)

    async def __aiter__(self) -> AsyncIterator[decode_pb2.OpenRequest]:
        while True:
            yield await self.commands.get()


def serve_gateway(host: Host, context: Context, gateway: Gateway) -> asyncio.Task[None]:
    stream: Any = context
    return asyncio.create_task(
        serve_stream(
            host,
            aiter(gateway),
            stream,
            start=lambda session, command: None,
            response=lambda step: decode_pb2.OpenResponse(step=step),
            peer_timeout_s=0.3,
        )
    )


async def test_a_gateway_that_promised_heartbeats_and_is_silent_has_its_requests_given_up() -> None:
    host = Host()
    with pytest.raises(BatonError, match="silent"):
        await serve_gateway(host, Context(), Gateway(heartbeat_ms=50))
    assert host.closed == host.opened != []


@pytest.mark.parametrize(("heartbeat_ms", "pings"), [(50, True), (0, False)])
async def test_a_gateway_that_pings_or_never_promised_to_is_kept(heartbeat_ms: int, pings: bool) -> None:
    host, context, gateway = Host(), Context(), Gateway(heartbeat_ms)
    stream = serve_gateway(host, context, gateway)
    # Two heartbeats of the worker itself take longer than the silence that would be the end.
    while sum(not message.step.outputs for message in context.written) < 2:
        assert not stream.done()
        if pings:
            gateway.commands.put_nowait(decode_pb2.OpenRequest(ping=decode_pb2.Ping()))
        await asyncio.sleep(0.02)
    assert not host.closed
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
