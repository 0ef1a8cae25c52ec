"""The gateway's stream to a worker: commands up, outputs down, and a failure for each open request when it breaks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from helpers.fault_proxy import Fault, fault_proxy
from helpers.scripted_worker import ScriptedWorker, run_worker
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.services.core.errors import ErrorCode
from baton.services.core.router import Role
from baton.services.gateway import worker_link
from baton.services.gateway.mailbox import Mailbox
from baton.services.gateway.worker_link import Arrival, WorkerLink
from baton.services.runtime.net import free_port
from baton.services.worker import session

PREFILL = pb.PrefillReport()
GATEWAY = pb.WorkerIdentity(worker_id="gateway", incarnation="g")


def make_link(worker: ScriptedWorker, incarnation: str | None = None) -> WorkerLink:
    return WorkerLink(
        worker.identity.worker_id, incarnation or worker.incarnation, worker.role, worker.address, GATEWAY
    )


@asynccontextmanager
async def run_link() -> AsyncIterator[tuple[ScriptedWorker, WorkerLink]]:
    """A connected link, and the worker at its other end."""
    async with run_worker("d", Role.DECODE) as worker:
        link = make_link(worker)
        task = asyncio.create_task(link.run())
        await eventually(lambda: link.is_connected)
        try:
            yield worker, link
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def tokens_of(arrival: Arrival | None) -> tuple[int, list[int]]:
    """Of one that says tokens and nothing else."""
    assert arrival is not None
    assert arrival.tokens is not None
    return arrival.tokens.first_index, arrival.tokens.token_ids


def start(link: WorkerLink, request_id: str) -> Mailbox[Arrival | None]:
    arrivals: Mailbox[Arrival | None] = Mailbox()
    spec = pb.GenerationSpec(request_id=request_id, attempt=1, token_ids=[1, 2, 3], num_prompt_tokens=3)
    link.start(decode_pb2.Start(spec=spec), arrivals)
    return arrivals


async def test_outputs_go_to_their_requests_until_they_are_released() -> None:
    async with run_worker("d", Role.DECODE, lambda worker, spec: worker.say(spec, 0, 7, prefill=PREFILL)) as worker:
        link = make_link(worker)
        task = asyncio.create_task(link.run())
        await eventually(lambda: link.is_connected)
        first, second = start(link, "a"), start(link, "b")
        assert (link.num_inflight, link.num_inflight_tokens) == (2, 6)
        for name, arrivals in (("a", first), ("b", second)):
            arrival = await arrivals.get()
            assert arrival is not None
            assert arrival.output is not None
            assert (arrival.output.request_id, arrival.attempt) == (name, 1)
        link.release(("a", 1), cancel=True)
        link.release(("a", 1), cancel=True)
        await eventually(lambda: worker.cancels == [("a", 1)])
        worker.say(worker.starts[0].spec, 1, 8)
        worker.say(worker.starts[1].spec, 1, 9)
        assert tokens_of(await second.get()) == (1, [9])
        assert first.empty()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await second.get()).failure is not None  # whoever still waits must hear of it


@pytest.mark.parametrize("knows_columns", [True, False])
async def test_tokens_that_wait_are_added_to_those_before_them(knows_columns: bool) -> None:
    """In columns or, from a worker of the release before, one output each."""
    async with run_link() as (worker, link):
        worker.knows_columns = knows_columns
        first, second = start(link, "a"), start(link, "b")
        await eventually(lambda: len(worker.starts) == 2)
        a, b = (command.spec for command in worker.starts)
        assert 0 != a.handle != b.handle != 0
        for index in range(60):
            worker.say(a, index, index)
        await eventually(lambda: not first.empty())
        for index in range(60, 70):
            worker.say(a, index, index)
        for first_index, token_ids, newest in (
            (1, (7, 8), (1, [7, 8])),
            (3, (9,), (1, [7, 8, 9])),
            (5, (10,), (5, [10])),
        ):
            worker.say(b, first_index, *token_ids)
            await eventually(lambda newest=newest: not second.empty() and tokens_of(second.newest()) == newest)
        worker.say(b, 6, 11, transfer=pb.TransferReport())
        assert [tokens_of(await first.get()) for _ in range(2)] == [(0, list(range(60))), (60, list(range(60, 70)))], (
            "up to 64"
        )
        assert [tokens_of(await second.get()) for _ in range(2)] == [(1, [7, 8, 9]), (5, [10])]
        last = await second.get()
        assert last is not None
        assert last.output is not None
        assert first.empty()
        assert link.num_inflight_tokens == 0, "both prompts are computed"


async def test_what_has_been_taken_is_not_added_to() -> None:
    async with run_link() as (worker, link):
        arrivals = start(link, "a")
        await eventually(lambda: bool(worker.starts))
        worker.say(worker.starts[0].spec, 0, 7)
        reading = asyncio.ensure_future(arrivals.get())
        taken = await reading
        worker.say(worker.starts[0].spec, 1, 8)
        assert tokens_of(await arrivals.get()) == (1, [8])
        assert tokens_of(taken) == (0, [7])


async def test_columns_of_a_request_that_was_released_are_counted_and_dropped() -> None:
    fenced: list[int] = []
    async with run_link() as (worker, link):
        link.on_fenced = lambda: fenced.append(1)
        over, going_on = start(link, "a"), start(link, "b")
        await eventually(lambda: len(worker.starts) == 2)
        link.release(("a", 1), cancel=False)
        for command in worker.starts:
            worker.say(command.spec, 0, 7)
        assert tokens_of(await going_on.get()) == (0, [7])
        assert (over.empty(), fenced) == (True, [1])


async def test_a_worker_whose_columns_contradict_themselves_is_as_good_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    bent = pb.TokenColumns(handles=[1, 2], first_indices=[0, 0], token_ids=[7])
    monkeypatch.setattr(session, "columns_of", lambda rows: bent)
    async with run_worker("d", Role.DECODE) as worker:
        link = make_link(worker)
        task = asyncio.create_task(link.run())
        await eventually(lambda: link.is_connected)
        arrivals = start(link, "a")
        await eventually(lambda: bool(worker.starts))
        worker.say(worker.starts[0].spec, 0, 7)
        assert await task
        arrival = await arrivals.get()
        assert arrival is not None
        assert arrival.failure is not None
        assert (arrival.failure.code, arrival.failure.retryable) == (ErrorCode.WORKER_LOST, True)
        assert "do not fit each other: 2 requests, 2 indices" in arrival.failure.message
        assert arrivals.empty()


def test_handles_are_counted_round_and_none_is_given_twice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "_MAX_HANDLE", 3)
    link = WorkerLink("d", "i", Role.DECODE, "127.0.0.1:1", GATEWAY, is_connected=True)
    for name in "ab":
        start(link, name)
    link.release(("a", 1), cancel=False)
    assert [link._new_handle() for _ in range(4)] == [3, 1, 3, 1]


async def test_a_broken_stream_fails_every_open_request_once() -> None:
    async with run_worker("d", Role.DECODE) as worker:
        link = make_link(worker)
        task = asyncio.create_task(link.run())
        await eventually(lambda: link.is_connected)
        queues = [start(link, name) for name in "abc"]
        await eventually(lambda: len(worker.starts) == 3)
        worker.hang_up()
        assert await task
        for arrivals in queues:
            failure = arrivals.get_nowait().failure
            assert failure is not None
            assert (failure.code, failure.retryable) == (ErrorCode.WORKER_LOST, True)
            assert arrivals.empty()
        assert not link.is_connected
        assert not link.num_inflight


async def test_a_request_on_a_link_that_is_down_fails_at_once() -> None:
    link = WorkerLink("d", "i", Role.DECODE, "127.0.0.1:1", GATEWAY)
    assert start(link, "a").get_nowait().failure is not None
    assert not link.num_inflight


async def test_a_refused_connection_is_an_end_like_any_other() -> None:
    link = WorkerLink("d", "i", Role.DECODE, f"127.0.0.1:{free_port('127.0.0.1')}", GATEWAY)
    assert await link.run() is False


async def test_a_hello_that_is_refused_never_counts_as_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a moment: requests would be sent there, and be lost."""
    seen: list[bool] = []
    original = WorkerLink.__setattr__

    def watch(self: WorkerLink, name: str, value: object) -> None:
        if name == "is_connected":
            seen.append(bool(value))
        original(self, name, value)

    async with run_worker("d", Role.DECODE) as worker:
        link = make_link(worker, incarnation="another")
        monkeypatch.setattr(WorkerLink, "__setattr__", watch)
        assert await link.run() is False
    assert not any(seen)


async def test_the_same_link_connects_again() -> None:
    async with run_worker("p", Role.PREFILL) as worker:
        link = make_link(worker)
        for _ in range(2):
            task = asyncio.create_task(link.run())
            await eventually(lambda: link.is_connected)
            worker.hang_up()
            assert await task


async def test_a_worker_that_says_nothing_any_more_is_lost_and_what_it_says_later_is_not_served() -> None:
    fenced: list[int] = []
    async with run_worker("d", Role.DECODE) as worker:
        link = make_link(worker)
        link.on_fenced = lambda: fenced.append(1)
        task = asyncio.create_task(link.run())
        await eventually(lambda: link.is_connected)
        arrivals = start(link, "a")
        await eventually(lambda: bool(worker.starts))
        worker.freeze()
        failure = (await arrivals.get()).failure
        assert failure is not None
        assert (failure.code, "silent" in failure.message) == (ErrorCode.WORKER_LOST, True)
        assert await task
        spec = worker.starts[0].spec
        worker.say(spec, 0, 7)
        worker.wake()
        task = asyncio.create_task(link.run())
        await eventually(lambda: link.is_connected)
        worker.say(spec, 1, 8)  # on the new stream: the attempt is none of it
        await eventually(lambda: bool(fenced))
        assert arrivals.empty()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_connection_to_a_silent_worker_is_closed_at_once_not_when_garbage_is_collected() -> None:
    async with run_worker("d", Role.DECODE) as worker, fault_proxy() as proxy:
        host, _, port = worker.address.rpartition(":")
        proxy.target = (host, int(port))
        link = make_link(worker)
        link.address, link.peer_timeout_s = f"127.0.0.1:{proxy.port}", 0.6
        gc.disable()
        try:
            task = asyncio.create_task(link.run())
            await eventually(lambda: link.is_connected, timeout_s=30.0)
            proxy.board.set("*", Fault(stall=True))
            assert await task
            proxy.board.clear()
            await eventually(lambda: proxy.num_open == 0, timeout_s=15.0)  # long before a keepalive would notice
        finally:
            gc.enable()


async def test_nor_does_a_connection_stay_whose_hello_was_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "CONTROL_TIMEOUT_S", 0.5)
    async with run_worker("d", Role.DECODE) as worker, fault_proxy() as proxy:
        host, _, port = worker.address.rpartition(":")
        proxy.target = (host, int(port))
        proxy.board.set("*", Fault(stall=True, direction="back"))
        link = make_link(worker)
        link.address = f"127.0.0.1:{proxy.port}"
        gc.disable()
        try:
            assert not await link.run()
            proxy.board.clear()
            await eventually(lambda: proxy.num_open == 0, timeout_s=15.0)
        finally:
            gc.enable()


async def test_a_quiet_worker_that_lives_is_not_lost() -> None:
    async with run_worker("d", Role.DECODE) as worker:
        link = make_link(worker)
        task = asyncio.create_task(link.run())
        await eventually(lambda: link.is_connected)
        silence = link.peer_timeout_s
        done, _ = await asyncio.wait((task,), timeout=1.2 * silence)
        assert not done
        assert link.is_connected
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_frozen_worker_does_not_hold_up_whoever_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_link, "CONTROL_TIMEOUT_S", 0.1)
    async with run_worker("d", Role.DECODE) as worker:
        worker.freeze()
        assert await make_link(worker).run() is False
        worker.wake()
