"""Silence of a peer, and what only looks like it."""

from __future__ import annotations

import asyncio
import time

import pytest

from baton.api.common.v1 import common_pb2 as pb
from baton.services.runtime.namesakes import is_replaced_by
from baton.services.runtime.silence import Silence


async def test_a_peer_that_says_nothing_is_found_out() -> None:
    await asyncio.wait_for(Silence(0.1, 0.0).until(), 30.0)


async def test_a_peer_that_speaks_is_not() -> None:
    silence = Silence(0.2, 0.0)
    watch = asyncio.create_task(silence.until())
    began_s = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < began_s + 0.5:
        silence.heard()
        assert not watch.done()
        await asyncio.sleep(0)
    watch.cancel()


async def test_a_stall_of_this_process_is_nobodys_silence() -> None:
    """Frozen itself, or with a busy event loop, it has not read what was sent meanwhile."""
    silence = Silence(0.5, 0.0)
    watch = asyncio.create_task(silence.until())
    await asyncio.sleep(0)
    time.sleep(1.0)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not watch.done()
    silence.heard()
    watch.cancel()


def test_a_peer_gets_time_for_three_of_its_heartbeats() -> None:
    assert Silence(1.0, 0.5).limit_s == 1.5
    assert Silence(2.5, 0.5).limit_s == 2.5


def status(incarnation: str, started_ms: int, worker_id: str = "w") -> pb.WorkerStatus:
    identity = pb.WorkerIdentity(worker_id=worker_id, incarnation=incarnation)
    return pb.WorkerStatus(identity=identity, started_ms=started_ms)


@pytest.mark.parametrize(
    ("one", "other", "is_replaced"),
    [
        (status("a", 1), status("b", 2), True),
        (status("b", 2), status("a", 1), False),
        (status("a", 1), status("b", 1), True),  # together: somebody must go, and both must know who
        (status("b", 1), status("a", 1), False),
        (status("a", 1), status("a", 1), False),
        (status("a", 1), status("b", 2, "v"), False),
        (status("a", 0), status("b", 2), True),
        (status("a", 2), status("b", 0), True),
    ],
)
def test_of_two_with_one_id_the_later_one_serves(
    one: pb.WorkerStatus, other: pb.WorkerStatus, is_replaced: bool
) -> None:
    assert is_replaced_by(one, other) is is_replaced
