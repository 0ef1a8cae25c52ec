"""Failpoints in a running process: what each action does, how it ends, and who may have them at all."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from helpers.waiting import eventually, eventually_sync

from baton.api.worker.v1 import worker_pb2, worker_pb2_grpc
from baton.kvtransfer import failpoint as transfer_failpoint
from baton.kvtransfer.errors import TransferError
from baton.services.core.failpoints import parse_failpoints
from baton.services.runtime import failpoints
from baton.services.runtime import grpc as runtime_grpc
from baton.services.runtime.bus import NatsBus
from baton.services.runtime.failpoints import CRASH_STATUS, FailpointReached, clear_failpoints, set_failpoints
from baton.services.runtime.settings import ServeSettings
from baton.services.runtime.settings_loader import SettingsError, load_settings


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    clear_failpoints()


def put(text: str) -> None:
    set_failpoints(parse_failpoints(text))


async def test_nothing_happens_where_they_are_off() -> None:
    failpoints.reach("decode.step_n")
    await failpoints.reach_async("kv.commit.before")
    transfer_failpoint.reach("kv.send.frame_k")
    await transfer_failpoint.reach_async("kv.commit.before")
    assert transfer_failpoint.hook is None


async def test_raise_raises_what_the_point_is_about() -> None:
    put("decode.step_n=raise;engine.oom=raise;kv.send.frame_k=raise;lease.renew=raise;decode.before_first=raise")
    with pytest.raises(FailpointReached, match=r"failpoint decode\.step_n") as caught:
        failpoints.reach("decode.step_n")
    assert caught.value.retryable
    with pytest.raises(MemoryError):
        failpoints.reach("engine.oom", error=MemoryError)
    with pytest.raises(TransferError, match=r"kv\.send\.frame_k"):
        transfer_failpoint.reach("kv.send.frame_k")
    with pytest.raises(TransferError, match=r"lease\.renew"):
        await transfer_failpoint.reach_async("lease.renew")
    with pytest.raises(FailpointReached):
        await failpoints.reach_async("decode.before_first")


def test_a_thread_hangs_until_they_are_set_anew() -> None:
    put("engine.step_hang=hang")
    thread = threading.Thread(target=failpoints.reach, args=("engine.step_hang",), daemon=True)
    thread.start()
    assert failpoints._active is not None
    active = failpoints._active
    eventually_sync(lambda: active.failpoints.num_reached["engine.step_hang"] == 1, what="the point to be reached")
    assert thread.is_alive()
    put("")
    thread.join(30.0)
    assert not thread.is_alive()


async def test_a_coroutine_hangs_by_itself_until_they_are_set_anew() -> None:
    put("kv.commit.before=hang")
    task = asyncio.create_task(transfer_failpoint.reach_async("kv.commit.before"))
    assert failpoints._active is not None
    active = failpoints._active
    await eventually(lambda: active.failpoints.num_reached["kv.commit.before"] == 1, what="the point to be reached")
    assert not task.done()
    clear_failpoints()
    await asyncio.wait_for(task, 30.0)


async def test_a_delay_passes() -> None:
    put("decode.step_n=delay(1);kv.commit.before=delay(1)")
    failpoints.reach("decode.step_n")
    await failpoints.reach_async("kv.commit.before")


def test_crash_ends_the_process_with_a_status_of_its_own() -> None:
    script = (
        "from baton.services.core.failpoints import parse_failpoints as p\n"
        "from baton.services.runtime.failpoints import reach, set_failpoints\n"
        "set_failpoints(p('engine.step_crash=crash:token(5)'))\n"
        "reach('engine.step_crash', lambda: [4])\n"
        "print('alive', flush=True)\n"
        "try:\n    reach('engine.step_crash', lambda: [5])\n"
        "finally:\n    print('cleaned up', flush=True)\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == CRASH_STATUS
    assert "alive" in run.stdout
    assert "cleaned up" not in run.stdout  # not one step further, not even a finally
    assert "point=engine.step_crash" in run.stdout + run.stderr


async def test_a_message_is_dropped_and_counted() -> None:
    put("bus.publish=raise:once")
    bus = NatsBus("nats://127.0.0.1:1", name="test")
    bus.publish("subject", b"")
    bus.publish("subject", b"")
    assert bus.num_dropped == {"failpoint": 1, "disconnected": 1}


@pytest.fixture
async def stub() -> AsyncIterator[worker_pb2_grpc.FailpointServiceStub]:
    server = runtime_grpc.create_server()
    port = runtime_grpc.bind_server(server, "127.0.0.1", 0)
    names = failpoints.enable_failpoints("decode-3@decode.step_n=raise", server, "decode-3")
    assert names == ["baton.api.worker.v1.FailpointService"]
    await server.start()
    async with runtime_grpc.create_channel(f"127.0.0.1:{port}") as channel:
        yield worker_pb2_grpc.FailpointServiceStub(channel)
    await server.stop(0)


async def test_a_call_replaces_them_and_tells_what_was_reached(stub: worker_pb2_grpc.FailpointServiceStub) -> None:
    with pytest.raises(FailpointReached):
        failpoints.reach("decode.step_n")
    failpoints.reach("bus.publish")
    answer = await stub.SetFailpoints(worker_pb2.SetFailpointsRequest(failpoints="bus.publish=raise"))
    assert dict(answer.num_reached) == {"decode.step_n": 1, "bus.publish": 1}
    failpoints.reach("decode.step_n")
    with pytest.raises(FailpointReached):
        failpoints.reach("bus.publish")


async def test_a_call_that_is_not_understood_changes_nothing(stub: worker_pb2_grpc.FailpointServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SetFailpoints(worker_pb2.SetFailpointsRequest(failpoints="bus.publish=explode"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "crash, raise, hang" in (caught.value.details() or "")
    with pytest.raises(FailpointReached):
        failpoints.reach("decode.step_n")


def test_they_are_refused_where_other_machines_can_reach_the_process() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(ServeSettings, {"host": "0.0.0.0", "allow_insecure_bind": "true", "failpoints": "on"})
    assert caught.value.problems == (
        "--failpoints: only for a process that this machine alone can reach, not with --host 0.0.0.0",
    )
    assert load_settings(ServeSettings, {"failpoints": "on"}).failpoints == "on"


def test_a_mistake_in_them_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_FAILPOINTS", "bus.publish=explode")
    with pytest.raises(SettingsError) as caught:
        load_settings(ServeSettings, {})
    assert caught.value.problems == (
        "BATON_FAILPOINTS: 'bus.publish=explode': the action must be one of crash, raise, hang, delay(MS)",
    )
