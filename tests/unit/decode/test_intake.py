"""A decode worker's requests: blocks that come or do not come, and each request ending once with nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from helpers.scheduling import NAMER
from helpers.waiting import eventually
from helpers.worker_parts import (
    BLOCK_SIZE,
    PEER,
    Answer,
    CountingEngine,
    Reader,
    RecordingAgent,
    make_parts,
    make_spec,
)

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.kvtransfer.messages import FirstToken, Slot, TransferReport
from baton.services.decode.intake import DecodeWorker

SENDER = WorkerIdentity(PEER.worker_id, PEER.incarnation)
REPORT = TransferReport(
    transport="shm",
    num_blocks=3,
    num_blocks_skipped=0,
    num_bytes=300,
    duration_ms=1.0,
    commit_ms=0.5,
    reserve_wait_ms=0.0,
)


class Decode:
    """A worker over a counting engine; the test plays its transfer agent."""

    def __init__(self, **limits: Any) -> None:
        self.engine = CountingEngine()
        self.agent = RecordingAgent()
        self.worker = DecodeWorker(make_parts(self.engine, **limits), lambda scheduler, now_s: None, lambda: 0.0)
        self.worker.agent = cast(TransferAgent, self.agent)
        self.reader = Reader(self.worker.open_session(PEER))

    def start(self, spec: pb.GenerationSpec, *, is_remote: bool = True) -> None:
        self.worker.start(
            self.reader.session, decode_pb2.Start(spec=spec, prefill=PEER) if is_remote else decode_pb2.Start(spec=spec)
        )

    def reserve(self, spec: pb.GenerationSpec, names: Sequence[bytes] | None = None) -> asyncio.Future[Sequence[Slot]]:
        own = NAMER.names(list(spec.token_ids), BLOCK_SIZE)
        key = HandoffKey(spec.request_id, spec.attempt)
        return asyncio.ensure_future(self.worker.reserve(key, SENDER, names or own, len(spec.token_ids)))

    async def commit(self, spec: pb.GenerationSpec) -> None:
        token = FirstToken(spec.token_ids[-1] + 1, None, ())
        await self.worker.committed(HandoffKey(spec.request_id, spec.attempt), token, REPORT)

    async def assert_clean(self) -> None:
        for _ in range(100):
            counts, stats = await self.worker.steps.call(lambda s: (s.pool.counts(), s.stats()))
            if not (counts.request or counts.transfer or counts.quarantine or stats.running or stats.queued):
                break
        assert (counts.request, counts.transfer, counts.quarantine, counts.error) == (0, 0, 0, 0)
        assert (stats.running, stats.queued, stats.awaiting_kv) == (0, 0, 0)
        assert not self.worker.num_active
        assert not self.worker._expected

    def answer(self, request_id: str) -> Answer:
        return self.reader[request_id]


@asynccontextmanager
async def running(**limits: Any) -> AsyncIterator[Decode]:
    decode = Decode(**limits)
    decode.worker.steps.start()
    try:
        async with decode.reader:
            yield decode
    finally:
        decode.engine.gate.set()
        await decode.worker.stop_requests()
        await decode.worker.steps.stop()


async def test_blocks_come_and_the_answer_goes_on_at_the_second_token() -> None:
    async with running() as decode:
        spec = make_spec("r", 10, max_tokens=4)
        decode.start(spec)
        assert decode.agent.expected == {HandoffKey("r", 1): SENDER}
        assert [slot.index for slot in await decode.reserve(spec)] == [0, 1, 2]
        await decode.commit(spec)
        await eventually(lambda: decode.answer("r").num_ends == 1)
        assert decode.answer("r").token_ids == [12, 13, 14]
        await decode.assert_clean()


async def test_the_report_of_the_transfer_comes_before_the_end_of_a_very_short_answer() -> None:
    async with running() as decode:
        for number in range(20):
            spec = make_spec(f"r{number}", 10 + number % 5, max_tokens=2)
            decode.start(spec)
            await decode.reserve(spec)
            await decode.commit(spec)
            await eventually(lambda n=number: decode.answer(f"r{n}").num_ends == 1)
            transfer = decode.answer(f"r{number}").transfer
            assert transfer is not None
            assert transfer.num_blocks == 3
        await decode.assert_clean()


async def test_without_a_prefill_worker_it_prefills_itself() -> None:
    async with running() as decode:
        decode.start(make_spec("r", 10, max_tokens=3), is_remote=False)
        await eventually(lambda: decode.answer("r").num_ends == 1)
        assert decode.answer("r").token_ids == [11, 12, 13]
        assert not decode.agent.expected
        await decode.assert_clean()


async def test_a_reservation_waits_for_room_and_gets_it() -> None:
    async with running(num_blocks=4, max_model_len=16) as decode:
        first, second = make_spec("first", 10), make_spec("second", 9)
        second.cache_salt = "no block in common"
        decode.start(first)
        decode.start(second)
        await decode.reserve(first)
        waiting = decode.reserve(second, NAMER.names(list(second.token_ids), BLOCK_SIZE, second.cache_salt))
        await decode.worker.steps.call(lambda scheduler: None)
        assert not waiting.done()
        await decode.commit(first)
        assert [slot.index for slot in await waiting] == [0, 1, 2]
        await decode.commit(second)
        await eventually(lambda: decode.answer("second").num_ends == 1)
        await decode.assert_clean()


async def test_the_sender_gives_up_while_its_reservation_waits() -> None:
    async with running(num_blocks=4, max_model_len=16) as decode:
        first, second = make_spec("first", 10), make_spec("second", 9)
        decode.start(first)
        decode.start(second)
        await decode.reserve(first)
        waiting = decode.reserve(second)
        await decode.worker.steps.call(lambda scheduler: None)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await decode.worker.steps.call(lambda scheduler: scheduler.stats().queued) == 0
        decode.worker.cancel(decode.reader.session, "second", 1)
        await decode.commit(first)
        await eventually(lambda: decode.answer("first").num_ends == 1)
        await decode.assert_clean()


async def test_names_that_differ_refuse_the_reservation_by_that_code() -> None:
    async with running() as decode:
        spec = make_spec("r")
        decode.start(spec)
        with pytest.raises(TransferError) as failure:
            await decode.reserve(spec, [b"x" * 16] * 3)
        assert failure.value.code is TransferCode.INCOMPATIBLE
        decode.worker.cancel(decode.reader.session, "r", 1)
        await decode.assert_clean()


async def test_a_handoff_nobody_announced_gets_nothing() -> None:
    async with running() as decode:
        with pytest.raises(TransferError) as failure:
            await decode.reserve(make_spec("r"))
        assert failure.value.code is TransferCode.UNKNOWN_HANDOFF
        with pytest.raises(TransferError):
            await decode.commit(make_spec("r"))


@pytest.mark.parametrize("is_quiet", [True, False])
async def test_a_handoff_that_fails_is_told_and_its_slots_come_back_when_writes_are_over(is_quiet: bool) -> None:
    async with running() as decode:
        spec, key = make_spec("r"), HandoffKey("r", 1)
        decode.start(spec)
        await decode.reserve(spec)
        error = TransferError(TransferCode.EXPIRED, "the lease ran out")
        await decode.worker.released(key, error, is_quiet)
        await eventually(lambda: decode.answer("r").num_ends == 1)
        assert decode.answer("r").error_code == "kv_handoff_failed"
        if not is_quiet:
            counts = await decode.worker.steps.call(lambda scheduler: scheduler.pool.counts())
            assert counts.quarantine == 3
            await decode.worker.released(key, error, True)
        await decode.assert_clean()


async def test_the_next_attempt_need_not_bring_what_was_verified_before_the_last_one_failed() -> None:
    async with running() as decode:
        spec = make_spec("r")
        decode.start(spec)
        slots = await decode.reserve(spec)
        error = TransferError(TransferCode.PEER_LOST, "the sender died")
        await decode.worker.released(HandoffKey("r", 1), error, False, (0,))
        await decode.worker.released(HandoffKey("r", 1), error, True)
        await eventually(lambda: decode.answer("r").num_ends == 1)
        again = make_spec("r2")  # the same prompt
        decode.start(again)
        granted = await decode.reserve(again)
        assert [slot.index for slot in granted] == [slot.index for slot in slots][1:]
        await decode.worker.released(HandoffKey("r2", 1), error, True)
        await decode.assert_clean()


async def test_a_sender_that_withdraws_says_itself_why() -> None:
    async with running() as decode:
        spec = make_spec("r")
        decode.start(spec)
        await decode.reserve(spec)
        await decode.worker.released(HandoffKey("r", 1), TransferError(TransferCode.ABORTED, "the last token"), True)
        await decode.assert_clean()
        assert not decode.answer("r").num_ends


async def test_cancelled_while_its_blocks_are_adopted_it_does_not_run_on_unseen() -> None:
    """The transfer cannot be given up any more then; the request can."""
    async with running(max_model_len=64) as decode:
        spec = make_spec("r", 10, max_tokens=50)
        decode.start(spec)
        await decode.reserve(spec)
        decode.engine.gate.clear()
        committing = asyncio.ensure_future(decode.commit(spec))
        await asyncio.sleep(0)
        decode.worker.cancel(decode.reader.session, "r", 1)
        assert decode.agent.forgotten == [HandoffKey("r", 1)]
        await committing
        await asyncio.sleep(0)
        decode.engine.gate.set()
        await decode.assert_clean()
        assert decode.engine.num_steps <= 1
        assert not decode.answer("r").num_ends


@pytest.mark.parametrize("phase", ["expected", "granted", "running", "local"])
async def test_a_stream_that_ends_gives_everything_up(phase: str) -> None:
    async with running(max_model_len=64) as decode:
        spec = make_spec("r", 10, max_tokens=50)
        decode.engine.gate.clear()
        decode.start(spec, is_remote=phase != "local")
        if phase in ("granted", "running"):
            await decode.reserve(spec)
        if phase == "running":
            await decode.commit(spec)
        if phase in ("running", "local"):
            await eventually(decode.engine.is_in_step.is_set)
        decode.worker.close_session(decode.reader.session)
        decode.engine.gate.set()
        if phase == "granted":  # what the agent does once it was told to forget
            await decode.worker.released(HandoffKey("r", 1), TransferError(TransferCode.ABORTED, "unwanted"), True)
        await decode.assert_clean()


async def test_a_commit_after_the_end_is_refused() -> None:
    async with running() as decode:
        spec = make_spec("r")
        decode.start(spec)
        await decode.reserve(spec)
        decode.worker.cancel(decode.reader.session, "r", 1)
        with pytest.raises(TransferError):
            await decode.commit(spec)
        await decode.worker.released(HandoffKey("r", 1), TransferError(TransferCode.ABORTED, "unwanted"), True)
        await decode.assert_clean()


async def test_bad_specs_are_answered_and_the_stream_lives_on() -> None:
    async with running() as decode:
        bad = make_spec("bad")
        bad.sampling.temperature = float("nan")
        decode.start(bad)
        decode.start(make_spec("good", max_tokens=1), is_remote=False)
        await eventually(lambda: decode.answer("good").num_ends + decode.answer("bad").num_ends == 2)
        assert decode.answer("bad").error_code == "invalid_request"
        assert decode.answer("bad").last is not None
        assert decode.answer("bad").last.error.param == "sampling.temperature"  # type: ignore[union-attr]
        assert decode.answer("good").token_ids == [11]


async def test_a_gateway_cannot_cancel_anothers_request() -> None:
    async with running() as decode:
        decode.engine.gate.clear()
        decode.start(make_spec("r", max_tokens=1), is_remote=False)
        other = decode.worker.open_session(PEER)
        decode.worker.cancel(other, "r", 1)
        decode.worker.cancel(decode.reader.session, "r", 2)
        decode.worker.close_session(other)
        decode.engine.gate.set()
        await eventually(lambda: decode.answer("r").token_ids == [11])
