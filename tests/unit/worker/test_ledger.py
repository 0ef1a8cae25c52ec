"""The ledger as a worker tells it: pages, filters, and what it knows of each holder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers.waiting import eventually
from helpers.worker_parts import PEER, CountingEngine, RecordingAgent, make_parts, make_spec

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.api.worker.v1 import worker_pb2
from baton.kvtransfer.identity import HandoffKey, WorkerIdentity
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.decode.intake import DecodeWorker
from baton.services.worker.ledger import LedgerServicer
from baton.services.worker.requests import scheduler_id, split_scheduler_id

GATEWAY = pb.WorkerIdentity(worker_id="gateway", incarnation="g")
BLOCK_BYTES = 32
SENDER = WorkerIdentity(PEER.worker_id, PEER.incarnation)


class Setting:
    """A decode worker whose clock is the test's."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.engine = CountingEngine()
        self.parts = make_parts(self.engine)
        self.worker = DecodeWorker(self.parts, self._on_turn, clock=lambda: self.now_s)
        self.worker.agent = RecordingAgent()  # type: ignore[assignment]
        self.ledger = LedgerServicer(self.worker, self.parts.pool, block_bytes=BLOCK_BYTES)
        self.session = self.worker.open_session(GATEWAY)

    def _on_turn(self, scheduler: Any, now_s: float) -> None:
        self.parts.pool.now_s = now_s

    async def receive(self, request_id: str, num_tokens: int = 10) -> None:
        """Blocks are granted to the transfer of a request from the peer."""
        spec = make_spec(request_id, num_tokens)
        self.worker.start(self.session, decode_pb2.Start(spec=spec, prefill=PEER))
        active = self.worker._active[scheduler_id(request_id, 1)]
        names = self.worker.block_names(active.request)
        await self.worker.reserve(HandoffKey(request_id, 1), SENDER, names, num_tokens)

    async def blocks(self, **request: Any) -> worker_pb2.GetBlocksResponse:
        return await self.ledger.GetBlocks(worker_pb2.GetBlocksRequest(**request), None)  # type: ignore[arg-type]


@pytest.fixture
async def setting() -> AsyncIterator[Setting]:
    made = Setting()
    made.worker.steps.start()
    yield made
    await made.worker.steps.stop()


async def test_a_transfer_is_named_with_request_peer_phase_age_and_deadline(setting: Setting) -> None:
    await setting.receive("r")
    setting.now_s += 2.0
    answer = await setting.blocks()
    assert answer.worker_id == "here"
    assert not answer.HasField("next_block_id")
    assert len(answer.blocks) == 3  # of 4 tokens each
    for block in answer.blocks:
        assert (block.state, block.request_id, block.attempt) == ("transfer", "r", 1)
        assert (block.peer, block.phase, block.generation) == (str(SENDER), "awaiting_kv", 1)
        assert block.age_s == pytest.approx(2.0)
        assert block.deadline_in_s == pytest.approx(setting.parts.limits.transfer_lease_s - 2.0)


async def test_only_what_is_past_its_deadline_is_overdue(setting: Setting) -> None:
    await setting.receive("late")
    setting.now_s += setting.parts.limits.transfer_lease_s + 1.0
    await setting.receive("new")
    assert {block.request_id for block in (await setting.blocks()).blocks} == {"late", "new"}
    overdue = (await setting.blocks(overdue_only=True)).blocks
    assert {block.request_id for block in overdue} == {"late"}
    assert all(block.deadline_in_s == pytest.approx(-1.0) for block in overdue)


async def test_pages_follow_each_other_and_cover_everything(setting: Setting) -> None:
    await setting.receive("a", 14)
    await setting.receive("b", 6)
    ids, first = [], 0
    while True:
        page = await setting.blocks(first_block_id=first, max_num_blocks=4)
        ids += [block.block_id for block in page.blocks]
        if not page.HasField("next_block_id"):
            break
        first = page.next_block_id
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids) == 6
    with pytest.raises(BatonError) as caught:
        await setting.blocks(max_num_blocks=10_001)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, "max_num_blocks")


async def test_prefix_cache_is_shown_on_request_and_quarantine_always(setting: Setting) -> None:
    setting.worker.start(setting.session, decode_pb2.Start(spec=make_spec("done", 9)))
    await eventually(lambda: not setting.worker.num_active, timeout_s=30.0, what="the end of the request")
    await setting.receive("lost")
    error = asyncio.ensure_future(
        setting.worker.steps.call(
            lambda scheduler: scheduler.abort_reservation(
                scheduler_id("lost", 1), writes_quiet=False, now=setting.now_s
            )
        )
    )
    await error
    held = (await setting.blocks()).blocks
    assert {(block.state, block.request_id, block.phase) for block in held} == {("quarantine", "lost", "ended")}
    cached = (await setting.blocks(include_cached=True)).blocks
    assert {block.state for block in cached} == {"quarantine", "cached"}
    for block in cached:
        if block.state == "cached":
            assert block.name
            assert not block.request_id
            assert not block.HasField("age_s")


def test_a_workers_name_of_a_request_is_taken_apart_again() -> None:
    assert split_scheduler_id(scheduler_id("a#b", 3)) == ("a#b", 3)
    assert split_scheduler_id("get names") == ("get names", 0)


async def test_a_session_is_known_from_its_first_request_until_it_is_closed(setting: Setting) -> None:
    spec = make_spec("r", 10)
    spec.session.key, spec.session.ttl_ms = "t/s", 5_000
    setting.worker.start(setting.session, decode_pb2.Start(spec=spec))

    async def session(key: str = "t/s") -> worker_pb2.GetSessionResponse:
        return await setting.ledger.GetSession(worker_pb2.GetSessionRequest(key=key), None)  # type: ignore[arg-type]

    async def close() -> bool:
        request = worker_pb2.CloseSessionRequest(key="t/s")
        return (await setting.ledger.CloseSession(request, None)).was_known  # type: ignore[arg-type]

    await eventually(lambda: not setting.worker.num_active)
    answer = await session()
    assert (answer.is_known, answer.expires_in_s) == (True, pytest.approx(5.0))
    assert answer.num_blocks > 0
    assert answer.num_bytes == answer.num_blocks * BLOCK_BYTES
    assert not (await session("u/s")).is_known
    assert [await close(), await close()] == [True, False]
    assert not (await session()).is_known


async def test_a_session_whose_time_is_over_is_not_known(setting: Setting) -> None:
    spec = make_spec("r", 10)
    spec.session.key, spec.session.ttl_ms = "t/s", 5_000
    setting.worker.start(setting.session, decode_pb2.Start(spec=spec))
    await eventually(lambda: not setting.worker.num_active)
    setting.now_s += 5.0
    request = worker_pb2.GetSessionRequest(key="t/s")
    assert not (await setting.ledger.GetSession(request, None)).is_known  # type: ignore[arg-type]
    with pytest.raises(BatonError):
        await setting.ledger.GetSession(worker_pb2.GetSessionRequest(), None)  # type: ignore[arg-type]
