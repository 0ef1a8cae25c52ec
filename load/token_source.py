"""A worker that computes nothing: it speaks the decode service and says tokens as fast, or as evenly, as it is told to.

What is left to measure is the gateway. ``python -m baton.load.token_source EVERY_S`` prints its address; every ``EVERY_S``
seconds (0: as soon as the step before has been sent) each request gets a token. On standard input, a line asks for the times
of all tokens that were said since, as JSON: request id -> time.perf_counter() of each, a clock that the processes of one
machine share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import structlog

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2, decode_pb2_grpc
from baton.services.runtime import grpc as runtime_grpc
from baton.services.runtime.main import loop_factory
from baton.services.runtime.token_columns import TokenRow
from baton.services.worker.session import PlainTokens, Session, serve_stream

MAX_MODEL_LEN = 4096
# Of the bundled model's vocabulary: an ordinary piece of text.
TOKEN_ID = 300


class TokenSource:
    """All requests step together, as in a batch."""

    def __init__(self, every_s: float) -> None:
        self._identity = pb.WorkerIdentity(worker_id="source", incarnation=uuid.uuid4().hex)
        self._every_s = every_s
        self._running: dict[str, tuple[Session, pb.GenerationSpec, int]] = {}
        self._said: dict[str, list[float]] = {}
        self._sessions: list[Session] = []  # of the last step
        self.address = ""

    @property
    def incarnation(self) -> str:
        return self._identity.incarnation

    def take_times(self) -> dict[str, list[float]]:
        """When each token was said, and no more after."""
        said, self._said = self._said, {}
        return said

    async def run(self) -> None:
        """Steps until cancelled."""
        next_s = time.perf_counter()
        while True:
            next_s = max(next_s + self._every_s, time.perf_counter())
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()) if self._running else 0.005)
            # A real batch is not steps ahead of its own output either. Steps that wait would be sent as one.
            if all(session.is_empty for session in self._sessions):
                self._step()

    def _step(self) -> None:
        by_session: dict[int, tuple[Session, list[pb.RequestOutput | PlainTokens]]] = {}
        for request_id, (session, spec, index) in list(self._running.items()):
            is_last = index + 1 >= spec.sampling.max_tokens
            by_session.setdefault(id(session), (session, []))[1].append(_output(spec, index, is_last=is_last))
            self._said.setdefault(request_id, []).append(time.perf_counter())
            if is_last:
                del self._running[request_id]
            else:
                self._running[request_id] = (session, spec, index + 1)
        for session, outputs in by_session.values():
            session.send(outputs)
        self._sessions = [session for session, _ in by_session.values()]

    # StreamHost

    def open_session(self, gateway: pb.WorkerIdentity) -> Session:
        return Session(gateway)

    def close_session(self, session: Session) -> None:
        self._running = {key: value for key, value in self._running.items() if value[0] is not session}

    def cancel(self, session: Session, request_id: str, attempt: int) -> None:
        self._running.pop(request_id, None)

    def start(self, session: Session, command: Any) -> None:
        """A request begins with the next step."""
        self._running[command.spec.request_id] = (session, command.spec, 0)

    def status(self) -> pb.WorkerStatus:
        """One that takes whatever comes."""
        layout = pb.KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32", order="x")
        return pb.WorkerStatus(
            identity=self._identity,
            role=pb.WORKER_ROLE_COLOCATED,
            state=pb.WORKER_STATE_READY,
            address=self.address,
            compatibility=pb.Compatibility(model_fingerprint="none", layout=layout, protocol_version=1),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4096,
            max_num_batched_tokens=8192,
            running=len(self._running),
            kv_blocks=pb.KVBlockCounts(total=1 << 20, free=1 << 20),
        )


def _output(spec: pb.GenerationSpec, index: int, *, is_last: bool) -> pb.RequestOutput | PlainTokens:
    """As a worker says it: in columns, but for what begins and ends a generation."""
    if spec.handle and index and not is_last:
        return PlainTokens(spec.request_id, spec.attempt, TokenRow(spec.handle, index, [TOKEN_ID]))
    output = pb.RequestOutput(
        request_id=spec.request_id,
        attempt=spec.attempt,
        first_index=index,
        tokens=[pb.Token(token_id=TOKEN_ID)],
        finish_reason=pb.FINISH_REASON_LENGTH if is_last else pb.FINISH_REASON_UNSPECIFIED,
    )
    if index == 0:
        output.prefill.SetInParent()
    return output


class _Servicer(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, source: TokenSource) -> None:
        self._source = source

    async def Open(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        await serve_stream(
            self._source,
            request_iterator,
            context,
            start=self._source.start,
            response=lambda step: decode_pb2.OpenResponse(step=step),
        )

    async def GetStatus(self, request: Any, context: Any) -> decode_pb2.GetStatusResponse:
        return decode_pb2.GetStatusResponse(status=self._source.status())


async def serve(every_s: float) -> None:
    """Until standard input ends."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # standard output is for answers
    source = TokenSource(every_s)
    server = runtime_grpc.create_server()
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(_Servicer(source), server)
    source.address = f"127.0.0.1:{runtime_grpc.bind_server(server, '127.0.0.1', 0)}"
    await server.start()
    print(source.address, flush=True)
    stepping = asyncio.create_task(source.run())
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(source.take_times()), flush=True)
    stepping.cancel()
    await server.stop(grace=None)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(float(sys.argv[1])))
