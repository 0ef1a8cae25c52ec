"""A prompt whose blocks another worker holds: they come, or do not; the prompt runs either way and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from helpers.scheduling import NAMER
from helpers.waiting import eventually
from helpers.worker_parts import (
    BLOCK_SIZE,
    PEER,
    CountingEngine,
    Reader,
    RecordingAgent,
    make_parts,
    make_spec,
)

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.api.prefill.v1 import prefill_pb2
from baton.kvtransfer.agent import TransferAgent
from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.fetch import NO_TOKEN
from baton.kvtransfer.identity import HandoffId, HandoffKey, WorkerIdentity
from baton.kvtransfer.messages import FirstToken, Slot, TransferReport
from baton.services.core.block_state import Hold, Owner
from baton.services.decode.intake import DecodeWorker
from baton.services.prefill.handover import PrefillWorker
from baton.services.worker.worker import Worker

HOLDER = WorkerIdentity("decode-7", "c" * 32)
KEY = HandoffKey("r", 1)
REPORT = TransferReport("shm", 2, 0, 200, 1.0, 0.5, 0.0)
LONG_MS = 60_000


class Setting:
    """A worker over a counting engine; the test plays the holder and the transfer agent."""

    def __init__(self, role: str, **limits: Any) -> None:
        self.engine = CountingEngine()
        self.agent = RecordingAgent()
        self.role = role
        worker_type: Any = PrefillWorker if role == "prefill" else DecodeWorker
        self.worker: Worker[Any] = worker_type(make_parts(self.engine, **limits), lambda scheduler, now_s: None)
        self.worker.agent = self.worker.fetcher.agent = cast(TransferAgent, self.agent)
        self.reader = Reader(self.worker.open_session(PEER))

    def start(self, spec: pb.GenerationSpec, *, num_blocks: int = 2, patience_ms: int = LONG_MS) -> None:
        """As a gateway does, naming the holder of the leading blocks."""
        holder = pb.WorkerIdentity(worker_id=HOLDER.worker_id, incarnation=HOLDER.incarnation)
        source = pb.FetchSource(holder=holder, address="127.0.0.1:1", num_blocks=num_blocks, patience_ms=patience_ms)
        worker: Any = self.worker
        if self.role == "prefill":
            command: Any = prefill_pb2.Start(spec=spec, decode=PEER, decode_address="127.0.0.1:1", fetch=source)
        else:
            command = decode_pb2.Start(spec=spec, fetch=source)
        worker.start(self.reader.session, command)

    async def asked(self, number: int = 0) -> tuple[bytes, ...]:
        """Names of the blocks that were asked for, as soon as they are."""
        await eventually(lambda: len(self.agent.fetches) > number, what="the fetch")
        assert self.agent.fetches[number].holder == HOLDER
        return self.agent.fetches[number].block_names

    async def reserve(self, key: HandoffKey = KEY, names: tuple[bytes, ...] | None = None) -> list[Slot]:
        names = await self.asked() if names is None else names
        return list(await self.host.reserve(key, HOLDER, names, len(names) * BLOCK_SIZE))

    @property
    def host(self) -> Any:
        """What the agent of such a worker talks to."""
        return self.worker.fetcher if self.role == "prefill" else self.worker

    async def has_answered(self, request_id: str = "r") -> None:
        """Prefill: until the handoff of the first token; decode: until the end."""
        if self.role == "prefill":
            await eventually(lambda: self.reader[request_id].token_ids == [11])
            self.agent.handoffs[-1].end(None)
            await eventually(lambda: self.reader[request_id].handed_over)
        else:
            await eventually(lambda: self.reader[request_id].num_ends == 1)
            assert self.reader[request_id].token_ids == [11, 12, 13, 14]

    async def assert_clean(self) -> None:
        async def is_clean() -> bool:
            counts, moves = await self.worker.steps.call(lambda s: (s.pool.counts(), s.moves))
            await self.worker.steps.call(lambda s: s.pool.check_integrity())
            held = counts.request or counts.transfer or counts.quarantine or moves._given or moves._taken
            fetcher = self.worker.fetcher
            return not (held or fetcher._wanted or fetcher._taking or fetcher._giving or self.worker._preparing)

        for _ in range(1000):
            if await is_clean():
                break
            await asyncio.sleep(0.01)
        assert await is_clean()


@asynccontextmanager
async def running(role: str, **limits: Any) -> AsyncIterator[Setting]:
    setting = Setting(role, **limits)
    setting.worker.steps.start()
    try:
        async with setting.reader:
            yield setting
    finally:
        setting.engine.gate.set()
        await setting.worker.stop_requests()
        await setting.worker.steps.stop()


each_role = pytest.mark.parametrize("role", ["prefill", "decode"])


@each_role
async def test_what_comes_is_not_computed(role: str) -> None:
    async with running(role) as setting:
        setting.start(make_spec("r", 10))
        assert await setting.asked() == tuple(NAMER.names(list(range(1, 11)), BLOCK_SIZE)[:2])
        assert [slot.index for slot in await setting.reserve()] == [0, 1]
        assert not setting.engine.num_steps  # it waits for its blocks
        await setting.host.committed(KEY, NO_TOKEN, REPORT)
        await setting.has_answered()
        answer = setting.reader["r"]
        assert answer.cached_tokens == 8
        assert answer.fetch is not None
        assert (answer.fetch.holder, answer.fetch.num_blocks, answer.fetch.num_bytes) == ("decode-7", 2, 200)
        assert not answer.fetch.HasField("error")
        await setting.assert_clean()


async def refused(setting: Setting) -> None:
    """The holder has evicted them; ``no_blocks`` was set before."""


async def lost(setting: Setting) -> None:
    await setting.reserve()
    await setting.host.released(KEY, TransferError(TransferCode.EXPIRED, "the lease ran out"), True)


async def lost_while_writing(setting: Setting) -> None:
    await setting.reserve()
    await setting.host.released(KEY, TransferError(TransferCode.PEER_LOST, "the link broke"), False)
    counts = await setting.worker.steps.call(lambda scheduler: scheduler.pool.counts())
    assert counts.quarantine == 2
    await setting.host.released(KEY, TransferError(TransferCode.PEER_LOST, "the link broke"), True)


async def withdrawn(setting: Setting) -> None:
    """The holder gave up while slots were looked for."""
    names = await setting.asked()
    reserving = asyncio.ensure_future(setting.host.reserve(KEY, HOLDER, names, 8))
    await asyncio.sleep(0)
    reserving.cancel()
    await asyncio.gather(reserving, return_exceptions=True)


async def committed_with_a_token(setting: Setting) -> None:
    await setting.reserve()
    with pytest.raises(TransferError) as failure:
        await setting.host.committed(KEY, FirstToken(5), REPORT)
    await setting.host.released(KEY, failure.value, True)


async def other_blocks(setting: Setting) -> None:
    with pytest.raises(TransferError) as failure:
        await setting.reserve(names=(b"x" * 16,))
    assert failure.value.code is TransferCode.PROTOCOL


@each_role
@pytest.mark.parametrize("fault", [refused, lost, lost_while_writing, withdrawn, committed_with_a_token, other_blocks])
async def test_whatever_goes_wrong_the_prompt_is_computed_and_the_reason_told(
    role: str, fault: Callable[[Setting], Any]
) -> None:
    async with running(role) as setting:
        if fault is refused:
            setting.agent.no_blocks = TransferError(TransferCode.EVICTED, "gone")
        setting.start(make_spec("r", 10))
        await setting.asked()
        await fault(setting)
        await setting.has_answered()
        answer = setting.reader["r"]
        assert answer.cached_tokens == 0
        assert answer.fetch is not None
        assert answer.fetch.error.code in {code.value for code in TransferCode}
        assert answer.fetch.error.message
        assert setting.agent.forgotten == [KEY]
        await setting.assert_clean()


@each_role
async def test_patience_ends_and_slots_that_were_granted_come_back(role: str) -> None:
    async with running(role) as setting:
        setting.start(make_spec("r", 10), patience_ms=50)
        await setting.reserve()
        await eventually(lambda: setting.agent.forgotten == [KEY])
        await setting.has_answered()
        assert setting.reader["r"].fetch is not None
        assert setting.reader["r"].fetch.error.code == "expired"  # type: ignore[union-attr]
        # The agent gives the handoff up, and says when no write can land.
        await setting.host.released(KEY, TransferError(TransferCode.ABORTED, "unwanted"), True)
        await setting.assert_clean()


@each_role
async def test_given_up_while_it_waits_for_blocks_it_never_runs(role: str) -> None:
    async with running(role) as setting:
        setting.start(make_spec("r", 10))
        await setting.reserve()
        setting.worker.cancel(setting.reader.session, "r", 1)
        assert not setting.worker.num_active
        await eventually(lambda: setting.agent.forgotten == [KEY])
        await setting.host.released(KEY, TransferError(TransferCode.ABORTED, "unwanted"), True)
        await setting.assert_clean()
        assert setting.engine.num_steps == 0
        assert not setting.reader["r"].num_ends


@each_role
async def test_blocks_that_are_here_are_not_asked_for(role: str) -> None:
    async with running(role) as setting:
        for number, request_id in enumerate(("first", "second")):
            setting.start(make_spec(request_id, 10), num_blocks=9)  # more than the prompt has
            if not number:
                key = HandoffKey("first", 1)
                await setting.reserve(key)
                await setting.host.committed(key, NO_TOKEN, REPORT)
            await setting.has_answered(request_id)
        assert len(setting.agent.fetches) == 1
        assert setting.reader["second"].fetch is None
        assert setting.reader["second"].cached_tokens == 8
        await setting.assert_clean()


async def test_several_choices_of_one_prompt_fetch_once() -> None:
    async with running("decode") as setting:
        for number in range(3):
            setting.start(make_spec(f"r{number}", 10))
        await setting.asked()
        key = setting.agent.fetches[0].key
        await setting.reserve(key)
        await setting.host.committed(key, NO_TOKEN, REPORT)
        for number in range(3):
            await setting.has_answered(f"r{number}")
            assert setting.reader[f"r{number}"].cached_tokens == 8
        assert len(setting.agent.fetches) == 1
        await setting.assert_clean()


@each_role
async def test_without_room_nothing_is_taken_and_nothing_waits(role: str) -> None:
    async with running(role) as setting:
        setting.start(make_spec("r", 10))
        await setting.asked()
        hold = Hold(Owner.REQUEST, "other")
        taken = await setting.worker.steps.call(lambda scheduler: scheduler.pool.allocate(31, hold))
        with pytest.raises(TransferError, match="2 blocks wanted") as failure:
            await setting.reserve()
        assert failure.value.code is TransferCode.NO_CAPACITY
        setting.worker.steps.post(lambda scheduler: scheduler.pool.release(taken, hold))
        await setting.has_answered()
        assert setting.reader["r"].fetch is not None
        assert setting.reader["r"].fetch.error.code == "no_capacity"
        await setting.assert_clean()


async def test_a_draining_worker_gives_nothing_new_and_waits_for_what_it_gives() -> None:
    async with running("decode") as setting:
        worker: Any = setting.worker
        worker.start(setting.reader.session, decode_pb2.Start(spec=make_spec("earlier", 10)))
        await eventually(lambda: setting.reader["earlier"].num_ends == 1)
        names = NAMER.names(list(range(1, 11)), BLOCK_SIZE)
        handoff = HandoffId(KEY, HOLDER, WorkerIdentity("prefill-0", "d" * 32))
        assert len(await setting.worker.fetcher.pin(handoff, names)) == 2
        draining = asyncio.ensure_future(setting.worker.drain())
        await eventually(lambda: setting.worker.fetcher._is_draining)
        with pytest.raises(TransferError) as failure:
            await setting.worker.fetcher.pin(HandoffId(HandoffKey("s", 1), HOLDER, HOLDER), names)
        assert failure.value.code is TransferCode.DRAINING
        assert not draining.done()
        setting.worker.fetcher.unpin(handoff)
        await draining
        await setting.assert_clean()


async def test_leases_of_moves_under_way_are_renewed() -> None:
    async with running("prefill") as setting:
        setting.start(make_spec("r", 10))
        await setting.reserve()

        async def deadline_s() -> float:
            entries = await setting.worker.steps.call(lambda scheduler: list(scheduler.pool.ledger()))
            deadlines = [entry.deadline_s for entry in entries if entry.deadline_s is not None]
            assert len(deadlines) == 2
            return deadlines[0]

        before_s = await deadline_s()
        setting.worker.renew_leases()
        assert await deadline_s() > before_s
        await setting.host.committed(KEY, NO_TOKEN, REPORT)
        await setting.has_answered()


async def test_an_ordinary_handoff_needs_a_first_token() -> None:
    async with running("decode") as setting:
        worker: Any = setting.worker
        worker.start(setting.reader.session, decode_pb2.Start(spec=make_spec("r", 10), prefill=PEER))
        await worker.reserve(KEY, HOLDER, NAMER.names(list(range(1, 11)), BLOCK_SIZE), 10)
        with pytest.raises(TransferError, match="without a first token") as failure:
            await worker.committed(KEY, NO_TOKEN, REPORT)
        await worker.released(KEY, failure.value, True)
        await eventually(lambda: setting.reader["r"].num_ends == 1)
        await setting.assert_clean()
