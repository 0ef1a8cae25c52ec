"""The gateway's one stream to one worker: commands of all requests go up, one message per engine step comes down."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import grpc
import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.api.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.router import Role
from baton.services.gateway.mailbox import Bell, Mailbox
from baton.services.gateway.outputs import plain_token_ids
from baton.services.runtime.grpc import CONTROL_TIMEOUT_S, create_channel
from baton.services.runtime.silence import HEARTBEAT_METADATA, HEARTBEAT_S, Silence
from baton.services.runtime.token_columns import TokenRow, rows_of

log = structlog.get_logger(__name__)

Key: TypeAlias = tuple[str, int]  # request id, attempt

# Tokens of one generation that are passed on together, where so many wait.
_MOST_AT_ONCE = 64
_MAX_HANDLE = 2**32 - 1


class Arrival(NamedTuple):
    """What a worker said about one request: plain tokens, any other output, or the failure that ended its part."""

    link: WorkerLink
    attempt: int
    output: pb.RequestOutput | None = None
    failure: BatonError | None = None
    tokens: TokenRow | None = None  # the next ones are added to it for as long as nobody has taken it


@dataclass(slots=True)
class _Open:
    key: Key
    handle: int  # its name in columns
    arrivals: Mailbox[Arrival | None]
    num_tokens: int  # of its prompt, to be computed there
    tpot_target_s: float | None = None
    is_whole: bool = False  # a prefill worker answers it itself


@dataclass(slots=True, eq=False)
class WorkerLink:
    """Use ``run`` as a task; it returns when the stream is over. Then every open request gets a retryable failure, once."""

    worker_id: str
    incarnation: str
    role: Role
    address: str
    gateway: pb.WorkerIdentity
    open_channel: Callable[[str], grpc.aio.Channel] = create_channel
    on_connected: Callable[[], None] = lambda: None
    on_usable: Callable[[], None] = lambda: None  # it can be used now, or no longer
    on_load: Callable[[], None] = lambda: None  # what this gateway has there has changed
    on_fenced: Callable[[], None] = lambda: None  # an output of a request that was released
    peer_timeout_s: float = 2.5
    is_connected: bool = False
    _silence: Silence | None = None
    _told: str = ""  # why there was no link
    _open: dict[Key, _Open] = field(default_factory=dict)
    _by_handle: dict[int, _Open] = field(default_factory=dict)
    _last_handle: int = 0
    num_inflight_tokens: int = 0
    """Prompt tokens of this gateway's requests that are to be computed there, those that the last report knows of included."""
    num_answering: int = 0
    """Requests of this gateway that a prefill worker answers itself."""
    handed_over_s: float = -math.inf
    """When a request was last sent there whose prompt another worker computes, on the event loop's clock."""
    _commands: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    _bell: Bell = field(default_factory=Bell)

    @property
    def identity(self) -> pb.WorkerIdentity:
        return pb.WorkerIdentity(worker_id=self.worker_id, incarnation=self.incarnation)

    @property
    def is_suspect(self) -> bool:
        """Connected, but silent for longer than it promised."""
        return self._silence is not None and self._silence.is_suspect

    @property
    def num_inflight(self) -> int:
        """Requests of this gateway on that worker."""
        return len(self._open)

    async def run(self) -> bool:
        """Holds the stream until it breaks or the task is cancelled; False when the worker never accepted it."""
        reason, was_connected = "connection closed", False
        async with self.open_channel(self.address) as channel, AsyncExitStack() as stack:
            call = self._stub(channel).Open()
            stack.callback(call.cancel)
            try:
                heartbeat_s = await self._greet(call)
                silence = self._silence = Silence(self.peer_timeout_s, heartbeat_s, self.on_usable)
                ends = [asyncio.create_task(self._read(call, silence))]
                stack.push_async_callback(_end_tasks, ends)
                if heartbeat_s:
                    ends.append(asyncio.create_task(self._watch(silence)))
                if not call.done():
                    writer = asyncio.create_task(self._write(call, HEARTBEAT_S if heartbeat_s else None))
                    stack.push_async_callback(_end_tasks, [writer])
                    self.is_connected = was_connected = True
                    self.on_usable()
                    self.on_connected()
                reason = await _first_failure(ends) or reason
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                reason = _why(error)
            finally:
                self.is_connected = False
                self.on_usable()
                self._fail_all(reason)
        if was_connected:
            log.info("link to worker ended", worker_id=self.worker_id, reason=reason)
        elif reason != self._told:  # the same again and again, as with a certificate that the worker refuses
            self._told = reason
            log.warning("no link to worker", worker_id=self.worker_id, address=self.address, reason=reason)
        return was_connected

    async def _greet(self, call: Any) -> float:
        """Says hello. Returns how often the worker promises to say something, in seconds; 0: it does not."""
        messages = self._messages
        hello = messages.Hello(
            gateway=self.gateway, worker_incarnation=self.incarnation, heartbeat_ms=int(HEARTBEAT_S * 1e3)
        )
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            await call.write(messages.OpenRequest(hello=hello))
            metadata = await call.initial_metadata()  # the worker has accepted the hello, or refused it for good
        promised = dict(metadata or ()).get(HEARTBEAT_METADATA, "0")
        return int(promised) / 1e3 if promised.isdecimal() else 0.0

    async def _read(self, call: Any, silence: Silence) -> None:
        async for response in call:
            silence.heard()
            step = response.step
            if step.HasField("tokens"):
                for row in rows_of(step.tokens):
                    self._deliver_row(row)
            for output in step.outputs:
                self._deliver(output)
            self._bell.ring()

    async def _watch(self, silence: Silence) -> None:
        await silence.until()
        raise TimeoutError(f"silent for {silence.limit_s:g} s")

    @property
    def tightest_tpot_s(self) -> float | None:
        """The strictest target of this gateway's requests there; None where none has one."""
        return min((one.tpot_target_s for one in self._open.values() if one.tpot_target_s is not None), default=None)

    def start(
        self,
        request: decode_pb2.Start | prefill_pb2.Start,
        arrivals: Mailbox[Arrival | None],
        tpot_target_s: float | None = None,
    ) -> None:
        """Sends a request to the worker; what it says about it goes to ``arrivals`` until ``release``."""
        spec = request.spec
        key = (spec.request_id, spec.attempt)
        is_handed_over = isinstance(request, decode_pb2.Start) and request.HasField("prefill")
        is_whole = isinstance(request, prefill_pb2.Start) and not request.HasField("decode")
        num_tokens = 0 if is_handed_over else len(spec.token_ids)
        opened = _Open(key, self._new_handle(), arrivals, num_tokens, tpot_target_s, is_whole)
        if not self.is_connected:
            self._tell_lost(opened, "not connected")
        else:
            self._open[key] = self._by_handle[opened.handle] = opened
            spec.handle = opened.handle
            self.num_inflight_tokens += opened.num_tokens
            self.num_answering += is_whole
            if is_handed_over:
                self.handed_over_s = asyncio.get_running_loop().time()
            self.on_load()
            self._commands.put_nowait(self._messages.OpenRequest(start=request))

    def release(self, key: Key, *, cancel: bool) -> None:
        """Forgets a request; with ``cancel`` the worker is told to give it up. Idempotent."""
        if not self._close(key) or not cancel:
            return
        request_id, attempt = key
        messages = self._messages
        command = messages.Cancel(request_id=request_id, attempt=attempt)
        self._commands.put_nowait(messages.OpenRequest(cancel=command))

    def _close(self, key: Key) -> bool:
        opened = self._open.pop(key, None)
        if opened is None:
            return False
        del self._by_handle[opened.handle]
        self.num_inflight_tokens -= opened.num_tokens
        self.num_answering -= opened.is_whole
        self.on_load()
        return True

    def _new_handle(self) -> int:
        """One that no open request has. They are counted round: the last one who had it is long over."""
        while True:
            self._last_handle = self._last_handle % _MAX_HANDLE + 1
            if self._last_handle not in self._by_handle:
                return self._last_handle

    @property
    def _messages(self) -> Any:
        """The two services have the same commands, each in its own package."""
        return prefill_pb2 if self.role is Role.PREFILL else decode_pb2

    def _stub(self, channel: grpc.aio.Channel) -> Any:
        if self.role is Role.PREFILL:
            return prefill_pb2_grpc.PrefillServiceStub(channel)
        return decode_pb2_grpc.DecodeServiceStub(channel)

    async def _write(self, call: Any, heartbeat_s: float | None) -> None:
        """``heartbeat_s``: a worker that knows pings gets one when there was nothing else to say for so long."""
        messages = self._messages
        while True:
            try:
                async with asyncio.timeout(heartbeat_s):
                    command = await self._commands.get()
            except TimeoutError:
                command = messages.OpenRequest(ping=messages.Ping())
            try:
                await call.write(command)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reading side sees the same end and reports it

    def _deliver(self, output: pb.RequestOutput) -> None:
        request = self._open.get((output.request_id, output.attempt))
        if request is None:
            self.on_fenced()
            return
        if output.tokens:
            self._begin_tokens(request)
        token_ids = plain_token_ids(output)
        if token_ids is not None:
            self._leave_tokens(request, TokenRow(request.handle, output.first_index, token_ids))
        else:
            request.arrivals.leave(Arrival(self, output.attempt, output))
            self._bell.add(request.arrivals)

    def _deliver_row(self, row: TokenRow) -> None:
        request = self._by_handle.get(row.handle)
        if request is None:
            self.on_fenced()
            return
        self._begin_tokens(request)
        self._leave_tokens(request, row)

    def _begin_tokens(self, request: _Open) -> None:
        """There are tokens: the prompt is computed."""
        if request.num_tokens:
            self.num_inflight_tokens -= request.num_tokens
            request.num_tokens = 0
            self.on_load()

    def _leave_tokens(self, request: _Open, row: TokenRow) -> None:
        """Behind the tokens that wait, if those are the ones before: a reader that is late takes all of them at once."""
        newest = request.arrivals.newest()
        if newest is not None and newest.tokens is not None and newest.link is self:
            waiting = newest.tokens
            follows = waiting.handle == row.handle and waiting.first_index + len(waiting.token_ids) == row.first_index
            if follows and len(waiting.token_ids) + len(row.token_ids) <= _MOST_AT_ONCE:
                waiting.token_ids.extend(row.token_ids)
                return
        request.arrivals.leave(Arrival(self, request.key[1], tokens=row))
        self._bell.add(request.arrivals)

    def _fail_all(self, reason: str) -> None:
        for key in list(self._open):
            self._fail(key, reason)
        while not self._commands.empty():
            self._commands.get_nowait()

    def _fail(self, key: Key, reason: str) -> None:
        opened = self._open[key]
        self._close(key)
        self._tell_lost(opened, reason)

    def _tell_lost(self, opened: _Open, reason: str) -> None:
        message = f"worker {self.worker_id} was lost ({reason})"
        failure = BatonError(ErrorCode.WORKER_LOST, message, retryable=True)
        opened.arrivals.put_nowait(Arrival(self, opened.key[1], failure=failure))


async def _first_failure(tasks: list[asyncio.Task[None]]) -> str:
    """Waits for the first to end; returns why it failed, empty if it did not.

    Nothing is raised on: a traceback through the caller would keep it, and its call, until the collector comes by. The
    connection to a peer that is merely silent would stay open as long.
    """
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    errors = [error for task in done if (error := task.exception()) is not None]
    unforeseen = [error for error in errors if not isinstance(error, (grpc.aio.AioRpcError, TimeoutError, BatonError))]
    if unforeseen:
        raise unforeseen[0]
    return _why(errors[0]) if errors else ""


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details() or 'no details'}"
    return str(error) or "no answer to the hello"


async def _end_tasks(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels them and takes in how they ended: all but the first to end say the same, or nothing."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
