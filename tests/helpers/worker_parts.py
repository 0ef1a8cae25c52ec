"""What a worker is made of, without a model or sockets: an engine that counts, and an agent that writes down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from helpers.scheduling import NAMER, make_limits
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.api.prefill.v1 import prefill_pb2
from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.messages import FirstToken
from baton.kvtransfer.sending import HandoffSpec
from baton.services.core.block_pool import BlockPool
from baton.services.core.request import SampledToken
from baton.services.core.scheduler.base import ScheduledRequest, StepResult
from baton.services.prefill.handover import PrefillWorker
from baton.services.worker.parts import WorkerParts
from baton.services.worker.session import Session

VOCAB_SIZE = 1000
BLOCK_SIZE = 4
PEER = pb.WorkerIdentity(worker_id="peer", incarnation="b" * 32)


class CountingEngine:
    """Draws the number after the last token. A step waits while ``gate`` is closed, and raises where ``fails`` says so."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.is_in_step = threading.Event()
        self.fails: Callable[[list[ScheduledRequest]], bool] = lambda batch: False
        self.error: Exception = RuntimeError("the engine is broken")
        self.num_steps = 0
        self.closes_after: int | None = None  # the gate, after so many steps

    def step(self, batch: list[ScheduledRequest]) -> StepResult:
        self.num_steps += 1
        if self.num_steps == self.closes_after:
            self.gate.clear()
        self.is_in_step.set()
        assert self.gate.wait(10.0), "the test never opened the gate"
        self.is_in_step.clear()
        if self.fails(batch):
            raise self.error
        return StepResult(
            {
                item.request.request_id: SampledToken((item.request.token_ids[-1] + 1) % VOCAB_SIZE)
                for item in batch
                if item.samples
            }
        )


def make_parts(engine: CountingEngine, *, num_blocks: int = 32, **limits: Any) -> WorkerParts:
    return WorkerParts(
        identity=pb.WorkerIdentity(worker_id="here", incarnation="a" * 32),
        pool=BlockPool(num_blocks, BLOCK_SIZE, num_blocks // 2),
        limits=make_limits(**limits),
        engine=engine,
        namer=NAMER,
        vocab_size=VOCAB_SIZE,
        prefix_caching=True,
    )


def make_spec(request_id: str, num_tokens: int = 10, *, max_tokens: int = 4, attempt: int = 1) -> pb.GenerationSpec:
    """Its prompt counts from 1, so that token i of the answer is num_tokens + 1 + i."""
    sampling = pb.SamplingParams(max_tokens=max_tokens, top_p=1.0, repetition_penalty=1.0)
    tokens = range(1, num_tokens + 1)
    return pb.GenerationSpec(
        request_id=request_id, attempt=attempt, token_ids=tokens, num_prompt_tokens=num_tokens, sampling=sampling
    )


class Answer:
    """What one session has said about one request so far."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.last: pb.RequestOutput | None = None
        self.num_ends = 0
        self.handed_over = False
        self.transfer: pb.TransferReport | None = None
        self.fetch: pb.FetchReport | None = None
        self.cached_tokens = 0

    def take(self, output: pb.RequestOutput) -> None:
        assert not self.num_ends, f"more after the end: {output}"
        self.token_ids += [token.token_id for token in output.tokens]
        self.handed_over |= output.handed_over
        if output.HasField("transfer"):
            self.transfer = output.transfer
        if output.HasField("fetch"):
            self.fetch = output.fetch
        if output.HasField("prefill"):
            self.cached_tokens = output.prefill.cached_tokens
        if output.finish_reason:
            self.num_ends += 1
            self.last = output

    @property
    def error_code(self) -> str:
        assert self.last is not None
        return self.last.error.code


class Reader:
    """Reads a session as its stream would, for as long as it is entered."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.answers: dict[str, Answer] = {}
        self._task: asyncio.Task[None] | None = None

    def __getitem__(self, request_id: str) -> Answer:
        return self.answers.setdefault(request_id, Answer())

    async def __aenter__(self) -> Reader:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            for output in (await self.session.next_step()).outputs:
                self[output.request_id].take(output)


class RecordedHandoff:
    """A handoff that ends as the test says."""

    def __init__(self, spec: HandoffSpec) -> None:
        self.spec = spec
        self.ready: dict[int, int] = {}
        self.first_token: FirstToken | None = None
        self.aborted: str | None = None
        self.is_over = False
        self._done: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()

    def blocks_ready(self, blocks: Mapping[int, int]) -> None:
        self.ready.update(blocks)

    async def commit(self, first_token: FirstToken) -> None:
        self.first_token = first_token
        error = await asyncio.shield(self._done)
        if error is not None:
            raise error

    async def abort(self, reason: str) -> None:
        self.aborted = reason
        self.end(TransferError(TransferCode.ABORTED, reason))

    def end(self, error: TransferError | None) -> None:
        """The receiver took over (None), or it failed."""
        if not self.is_over:
            self.is_over = True
            self._done.set_result(error)
            assert self.spec.on_done is not None
            self.spec.on_done(error)


@dataclass(frozen=True)
class RecordedFetch:
    """Blocks that the worker asked a peer for."""

    key: HandoffKey
    holder: WorkerIdentity
    block_names: tuple[bytes, ...]


class RecordingAgent:
    """Both directions of a transfer agent, as the workers call it."""

    def __init__(self) -> None:
        self.handoffs: list[RecordedHandoff] = []
        self.expected: dict[HandoffKey, WorkerIdentity] = {}
        self.forgotten: list[HandoffKey] = []
        self.fetches: list[RecordedFetch] = []
        self.no_blocks: TransferError | None = None  # what the holder says to a fetch

    async def fetch(
        self,
        key: HandoffKey,
        holder: WorkerIdentity,
        holder_address: str,
        own_address: str,
        block_names: Sequence[bytes],
        deadline_s: float,
    ) -> int:
        self.fetches.append(RecordedFetch(key, holder, tuple(block_names)))
        if self.no_blocks is not None:
            raise self.no_blocks
        return len(block_names)

    def open(self, spec: HandoffSpec) -> RecordedHandoff:
        if any(not h.is_over and h.spec.request_id == spec.request_id for h in self.handoffs):
            raise ValueError("already under way")
        self.handoffs.append(RecordedHandoff(spec))
        return self.handoffs[-1]

    def expect(self, key: HandoffKey, sender: WorkerIdentity, deadline_s: float | None = None) -> None:
        self.expected[key] = sender

    def forget(self, key: HandoffKey) -> None:
        self.forgotten.append(key)


class Prefill:
    """A worker over a counting engine, whose handoffs end as the test says."""

    def __init__(self, **limits: Any) -> None:
        self.engine = CountingEngine()
        self.agent = RecordingAgent()
        self.now_s = 0.0
        self.worker = PrefillWorker(
            make_parts(self.engine, **limits), lambda scheduler, now_s: None, lambda: self.now_s
        )
        self.worker.agent = cast(TransferAgent, self.agent)
        self.reader = Reader(self.worker.open_session(PEER))

    def start(self, spec: pb.GenerationSpec) -> None:
        command = prefill_pb2.Start(spec=spec, decode=PEER, decode_address="127.0.0.1:1")
        self.worker.start(self.reader.session, command)

    def start_whole(self, spec: pb.GenerationSpec) -> None:
        """It is to answer the request itself."""
        self.worker.start(self.reader.session, prefill_pb2.Start(spec=spec))

    async def handoff(self, number: int = 0) -> RecordedHandoff:
        """As soon as it is open."""
        await eventually(lambda: len(self.agent.handoffs) > number, what="the handoff")
        return self.agent.handoffs[number]

    async def assert_clean(self) -> None:
        for _ in range(100):
            counts, stats = await self.worker.steps.call(lambda s: (s.pool.counts(), s.stats()))
            if not (counts.request or counts.transfer or stats.queued or stats.running or stats.handing_over):
                break
        assert (counts.request, counts.transfer, counts.quarantine, counts.error) == (0, 0, 0, 0)
        assert (stats.queued, stats.running, stats.handing_over) == (0, 0, 0)
        assert not self.worker.num_active
        assert not self.worker._destinations


@asynccontextmanager
async def prefill_running(**limits: Any) -> AsyncIterator[Prefill]:
    prefill = Prefill(**limits)
    prefill.worker.steps.start()
    try:
        async with prefill.reader:
            yield prefill
    finally:
        prefill.engine.gate.set()
        await prefill.worker.stop_requests()
        await prefill.worker.steps.stop()


def cancel(prefill: Prefill) -> None:
    prefill.worker.cancel(prefill.reader.session, "r", 1)


def hang_up(prefill: Prefill) -> None:
    prefill.worker.close_session(prefill.reader.session)
