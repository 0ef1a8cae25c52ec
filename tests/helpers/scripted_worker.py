"""A worker as gateways see it: a real gRPC service that writes down commands and says what the test says."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.api.prefill.v1 import prefill_pb2, prefill_pb2_grpc
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.router import Role
from baton.services.runtime import convert
from baton.services.runtime import grpc as runtime_grpc
from baton.services.runtime.token_columns import TokenRow
from baton.services.worker.session import PlainTokens, Session, serve_stream

Behaviour = Callable[["ScriptedWorker", pb.GenerationSpec], None]


def silent(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    """Takes the request and says nothing."""


class ScriptedWorker:
    """Speaks through ``say``; ``on_start`` reacts to a Start. Use ``run_worker``."""

    def __init__(self, worker_id: str, role: Role, on_start: Behaviour) -> None:
        self.identity = pb.WorkerIdentity(worker_id=worker_id, incarnation=uuid.uuid4().hex)
        self.role = role
        self.on_start = on_start
        self.address = ""
        self.knows_columns = True  # False: it is of the release before them
        self.sessions: list[Session] = []
        self.starts: list[Any] = []
        self.cancels: list[tuple[str, int]] = []
        self._is_awake = asyncio.Event()
        self._is_awake.set()
        self._streams: set[asyncio.Task[Any]] = set()
        self._server = runtime_grpc.create_server()

    @property
    def incarnation(self) -> str:
        return self.identity.incarnation

    def status(self, **fields: Any) -> pb.WorkerStatus:
        layout = pb.KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32", order="x")
        return pb.WorkerStatus(
            **{
                "identity": self.identity,
                "role": convert.role_to_wire(self.role),
                "state": pb.WORKER_STATE_READY,
                "address": self.address,
                "compatibility": pb.Compatibility(model_fingerprint="f", layout=layout, protocol_version=1),
                "max_model_len": 512,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 256,
                "kv_blocks": pb.KVBlockCounts(total=100, free=100),
            }
            | fields
        )

    def say(self, spec: pb.GenerationSpec, first_index: int, *token_ids: int, **fields: Any) -> None:
        """One output, to whoever is connected. Tokens alone go in columns, as a worker's do."""
        if spec.handle and token_ids and not fields and self.knows_columns:
            row = TokenRow(spec.handle, first_index, list(token_ids))
            for session in self.sessions:
                session.send([PlainTokens(spec.request_id, spec.attempt, row)])
            return
        tokens = [pb.Token(token_id=token_id) for token_id in token_ids]
        output = pb.RequestOutput(
            request_id=spec.request_id, attempt=spec.attempt, first_index=first_index, tokens=tokens, **fields
        )
        for session in self.sessions:
            session.send([output])

    def fail(self, spec: pb.GenerationSpec, code: ErrorCode, *, retryable: bool = True) -> None:
        error = convert.error_to_wire(BatonError(code, "as scripted", retryable=retryable))
        self.say(spec, 0, finish_reason=pb.FINISH_REASON_ERROR, error=error)

    def hang_up(self) -> None:
        """Ends every stream, as a reset connection does. The worker itself lives on."""
        for stream in self._streams:
            stream.cancel()

    def die(self) -> None:
        """The whole process is gone."""
        self._death = asyncio.ensure_future(self.stop())

    def freeze(self) -> None:
        """Not a word from now on, as when the process is stopped; connections stay."""
        self._is_awake.clear()

    def wake(self) -> None:
        """What was to be said is said now."""
        self._is_awake.set()

    async def listen(self, port: int = 0) -> None:
        add = (
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server
            if self.role is Role.PREFILL
            else decode_pb2_grpc.add_DecodeServiceServicer_to_server
        )
        add(_Servicer(self), self._server)
        self.address = f"127.0.0.1:{runtime_grpc.bind_server(self._server, '127.0.0.1', port)}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(grace=None)

    # StreamHost

    def open_session(self, gateway: pb.WorkerIdentity) -> Session:
        self.sessions.append(Session(gateway))
        return self.sessions[-1]

    def close_session(self, session: Session) -> None:
        self.sessions.remove(session)

    def cancel(self, session: Session, request_id: str, attempt: int) -> None:
        self.cancels.append((request_id, attempt))

    def start(self, session: Session, command: Any) -> None:
        self.starts.append(command)
        self.on_start(self, command.spec)

    async def serve(
        self, commands: AsyncIterator[Any], context: Any, response: Callable[[pb.StepOutputs], Any]
    ) -> None:
        await self._is_awake.wait()
        sleepy: Any = _SleepyContext(context, self._is_awake)
        stream = asyncio.ensure_future(serve_stream(self, commands, sleepy, start=self.start, response=response))
        self._streams.add(stream)
        try:
            await asyncio.wait({stream})
            if stream.cancelled():
                raise BatonError(ErrorCode.WORKER_LOST, "hung up")
            stream.result()
        finally:
            stream.cancel()
            self._streams.discard(stream)


class _SleepyContext:
    """Passes on what is written while the worker is awake."""

    def __init__(self, context: Any, is_awake: asyncio.Event) -> None:
        self._context = context
        self._is_awake = is_awake

    async def send_initial_metadata(self, metadata: Any) -> None:
        await self._is_awake.wait()
        await self._context.send_initial_metadata(metadata)

    async def write(self, message: Any) -> None:
        await self._is_awake.wait()
        await self._context.write(message)


class _Servicer:
    """Either service: the two differ in their messages only."""

    def __init__(self, worker: ScriptedWorker) -> None:
        self._worker = worker
        self._messages: Any = prefill_pb2 if worker.role is Role.PREFILL else decode_pb2

    async def Open(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        await self._worker.serve(request_iterator, context, lambda step: self._messages.OpenResponse(step=step))

    async def GetStatus(self, request: Any, context: Any) -> Any:
        return self._messages.GetStatusResponse(status=self._worker.status())

    async def Drain(self, request: Any, context: Any) -> Any:
        return self._messages.DrainResponse()


@asynccontextmanager
async def run_worker(
    worker_id: str, role: Role, on_start: Behaviour = silent, *, port: int = 0
) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker(worker_id, role, on_start)
    await worker.listen(port)
    try:
        yield worker
    finally:
        await worker.stop()
