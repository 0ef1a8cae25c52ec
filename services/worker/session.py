"""One gateway's stream to this worker: its commands come in, one message per engine step goes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grpc
import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.runtime.grpc import CONTROL_TIMEOUT_S
from baton.services.runtime.silence import HEARTBEAT_METADATA, HEARTBEAT_S, Silence
from baton.services.runtime.token_columns import TokenRow, columns_of

log = structlog.get_logger(__name__)


class PlainTokens(NamedTuple):
    """A step's new tokens of one request, of which nothing else is to be said."""

    request_id: str
    attempt: int
    row: TokenRow


class Session:
    """What the worker owes to one gateway. Everything it started is cancelled when its stream ends."""

    def __init__(self, gateway: pb.WorkerIdentity) -> None:
        self.gateway = gateway
        self._outbox: asyncio.Queue[Sequence[pb.RequestOutput | PlainTokens]] = asyncio.Queue()

    def send(self, outputs: Sequence[pb.RequestOutput | PlainTokens]) -> None:
        """The outputs of one step. They leave as one message, together with what an earlier step left behind."""
        self._outbox.put_nowait(outputs)

    @property
    def is_empty(self) -> bool:
        """Everything has left, or is being written."""
        return self._outbox.empty()

    async def next_step(self) -> pb.StepOutputs:
        """Waits for the next message to send. Several steps are one: a slow reader costs it fewer messages, not more."""
        message = _Message()
        message.add(await self._outbox.get())
        while not self._outbox.empty():
            message.add(self._outbox.get_nowait())
        return pb.StepOutputs(outputs=message.outputs.values(), tokens=columns_of(message.rows.values()))


class _Message:
    """Steps, joined: of a request there is one output, and a row of the tokens that come before it."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], pb.RequestOutput] = {}
        self.rows: dict[int, TokenRow] = {}

    def add(self, said: Sequence[pb.RequestOutput | PlainTokens]) -> None:
        for one in said:
            if isinstance(one, PlainTokens):
                self._add_tokens(one)
                continue
            first = self.outputs.setdefault((one.request_id, one.attempt), one)
            if first is not one:
                first_index = first.first_index if first.tokens else one.first_index
                first.MergeFrom(one)  # appends tokens, takes over what only the later one says
                first.first_index = first_index

    def _add_tokens(self, plain: PlainTokens) -> None:
        row = plain.row
        first = self.outputs.get((plain.request_id, plain.attempt)) if self.outputs else None
        if first is not None:
            if not first.tokens:
                first.first_index = row.first_index
            for token_id in row.token_ids:
                first.tokens.add(token_id=token_id)
        elif (earlier := self.rows.setdefault(row.handle, row)) is not row:
            earlier.token_ids.extend(row.token_ids)


class StreamHost(Protocol):
    """What the stream needs from the worker."""

    @property
    def incarnation(self) -> str: ...

    def open_session(self, gateway: pb.WorkerIdentity) -> Session: ...

    def close_session(self, session: Session) -> None: ...

    def cancel(self, session: Session, request_id: str, attempt: int) -> None: ...


async def serve_stream(
    host: StreamHost,
    commands: AsyncIterator[Any],
    context: grpc.aio.ServicerContext[Any, Any],
    *,
    start: Callable[[Session, Any], None],
    response: Callable[[pb.StepOutputs], Any],
    peer_timeout_s: float = 2.5,
) -> None:
    """Serves one Open call of the prefill or the decode service until the gateway ends it, or says nothing any more.

    ``start`` takes a Start command; ``response`` wraps a step's outputs in the service's own message.
    """
    try:
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            first = await anext(commands, None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("command") != "hello":
        raise BatonError(ErrorCode.INVALID_REQUEST, "the first message of a stream must be hello", param="hello")
    if first.hello.worker_incarnation not in ("", host.incarnation):
        raise BatonError(
            ErrorCode.STALE_INCARNATION,
            f"this worker is incarnation {host.incarnation}, not {first.hello.worker_incarnation}",
            retryable=True,
        )
    await context.send_initial_metadata(((HEARTBEAT_METADATA, str(int(HEARTBEAT_S * 1e3))),))
    session = host.open_session(first.hello.gateway)
    log.info("gateway connected", gateway=session.gateway.worker_id)
    silence = Silence(peer_timeout_s, first.hello.heartbeat_ms / 1e3)
    tasks = [
        asyncio.create_task(_send(session, context, response)),
        asyncio.create_task(_read(host, session, commands, start, silence)),
    ]
    if first.hello.heartbeat_ms:
        tasks.append(asyncio.create_task(_watch(silence)))
    try:
        # Either side's end is the stream's end; an error of either is the stream's error.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        host.close_session(session)
        log.info("gateway disconnected", gateway=session.gateway.worker_id)


async def _send(
    session: Session, context: grpc.aio.ServicerContext[Any, Any], response: Callable[[pb.StepOutputs], Any]
) -> None:
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                step = await session.next_step()
        except TimeoutError:
            step = pb.StepOutputs()
        await context.write(response(step))


async def _watch(silence: Silence) -> None:
    await silence.until()
    raise BatonError(ErrorCode.WORKER_LOST, f"the gateway has been silent for {silence.limit_s:g} s", retryable=True)


async def _read(
    host: StreamHost,
    session: Session,
    commands: AsyncIterator[Any],
    start: Callable[[Session, Any], None],
    silence: Silence,
) -> None:
    async for message in commands:
        silence.heard()
        match message.WhichOneof("command"):
            case "start":
                start(session, message.start)
            case "cancel":
                host.cancel(session, message.cancel.request_id, message.cancel.attempt)
            case "ping":
                pass
            case other:
                raise BatonError(ErrorCode.INVALID_REQUEST, f"unexpected {other} in the middle of a stream")
