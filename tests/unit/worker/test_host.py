"""The process around a worker: what a failed start leaves behind, and what the bus and GetStatus say of it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from helpers.oracle import make_prompt
from helpers.tiny_models import make_model_dir
from helpers.waiting import eventually
from pydantic import ByteSize

from baton.api.common.v1 import common_pb2 as pb
from baton.api.decode.v1 import decode_pb2
from baton.api.events.v1 import events_pb2
from baton.services.core.errors import ConfigurationError
from baton.services.decode.__main__ import DecodeHost
from baton.services.engine.loader import LoadedModel, load_model
from baton.services.prefill.__main__ import PrefillHost
from baton.services.runtime.bus import InProcessBus
from baton.services.runtime.failpoints import clear_failpoints
from baton.services.runtime.settings import WorkerSettings
from baton.services.runtime.subjects import Subjects
from baton.services.worker import worker as worker_module
from baton.services.worker.environment import Environment
from baton.services.worker.host import WorkerHost
from baton.services.worker.watchdog import STUCK_STATUS

# Full blocks of 40 tokens of prompt and 600 of answer, the last of which is never computed.
NUM_BLOCKS = (40 + 600 - 1) // 16
GATEWAY = pb.WorkerIdentity(worker_id="gateway", incarnation="g")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    make_model_dir("llama", folder)
    return load_model(folder, dtype="float32", device="cpu")


def make_host(
    loaded: LoadedModel,
    role: str = "decode",
    bus: InProcessBus | None = None,
    environment: Environment | None = None,
    **settings: Any,
) -> Any:
    values = {"role": role, "worker_id": "w", "cluster": "test", "nats_url": "none"}
    made = WorkerSettings(**(values | {"kv_cache_memory": ByteSize(4 << 20)} | settings))
    host_type: Callable[..., WorkerHost[Any]] = PrefillHost if role == "prefill" else DecodeHost
    return host_type(made, load=lambda: loaded, bus=bus or InProcessBus(), environment=environment)


class Ear:
    """What a gateway hears of the worker."""

    def __init__(self) -> None:
        self.bus = InProcessBus()
        self.statuses: list[pb.WorkerStatus] = []
        self.kv: list[events_pb2.KVEvents] = []
        self.has_left = False
        subjects = Subjects("test")
        self.bus.subscribe(subjects.all_workers, self._on_announcement)
        self.bus.subscribe(subjects.all_kv, lambda s, payload: self.kv.append(events_pb2.KVEvents.FromString(payload)))

    def _on_announcement(self, subject: str, payload: bytes) -> None:
        announcement = events_pb2.WorkerAnnouncement.FromString(payload)
        assert not self.has_left, "announced after its farewell"
        self.has_left = announcement.leaving
        self.statuses.append(announcement.status)


def run_one(host: Any, name: str, *, max_tokens: int) -> Any:
    """Starts a request that the worker prefills itself; returns its session."""
    session = host.worker.open_session(GATEWAY)
    sampling = pb.SamplingParams(max_tokens=max_tokens, top_p=1.0, repetition_penalty=1.0, ignore_eos=True)
    prompt = make_prompt(40)
    spec = pb.GenerationSpec(
        request_id=name, attempt=1, token_ids=prompt, num_prompt_tokens=len(prompt), sampling=sampling
    )
    host.worker.start(session, decode_pb2.Start(spec=spec))
    return session


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_the_first_announcement_knows_the_pool(loaded: LoadedModel, role: str) -> None:
    ear = Ear()
    host = make_host(loaded, role, ear.bus)
    await host.start()
    await eventually(lambda: bool(ear.statuses))
    assert ear.statuses[0].kv_blocks.total == ear.statuses[0].kv_blocks.free > 0
    assert ear.statuses[0].state == pb.WORKER_STATE_READY
    await host.stop()
    await asyncio.sleep(0)
    assert ear.has_left


async def test_the_end_of_the_load_is_announced_soon_and_its_blocks_are_known(loaded: LoadedModel) -> None:
    ear = Ear()
    host = make_host(loaded, "decode", ear.bus)
    await host.start()
    session = run_one(host, "r", max_tokens=600)  # long enough for a report in the middle
    await eventually(lambda: any(status.kv_blocks.request for status in ear.statuses))
    while not any(output.finish_reason for output in (await session.next_step()).outputs):
        pass
    ended_s = asyncio.get_running_loop().time()
    await eventually(lambda: not ear.statuses[-1].kv_blocks.request)
    assert asyncio.get_running_loop().time() - ended_s < 0.9  # not at the next regular announcement
    status = ear.statuses[-1]
    assert (status.running, status.queued, status.kv_blocks.cached) == (0, 0, NUM_BLOCKS)
    # A snapshot and the events behind it may name the same block twice.
    await eventually(lambda: len({name for events in ear.kv for name in events.stored}) == NUM_BLOCKS)
    assert [events.sequence for events in ear.kv] == list(range(1, len(ear.kv) + 1))
    await host.stop()


async def test_a_drain_whose_time_is_over_gives_up_what_is_left_and_counts_it(loaded: LoadedModel) -> None:
    host = make_host(loaded)
    await host.start()
    session = run_one(host, "r", max_tokens=200)
    await session.next_step()
    assert await host.drain_within(0.001) == 1
    status = await host.status()
    assert status.state == pb.WORKER_STATE_DRAINING
    while not (outputs := (await session.next_step()).outputs)[0].finish_reason:
        pass
    assert outputs[0].error.code == "draining"
    assert await host.drain_within(1.0) == 0
    await host.stop()


async def test_a_worker_behind_a_port_mapping_announces_the_ports_that_others_reach(loaded: LoadedModel) -> None:
    host = make_host(loaded, advertise_host="10.1.2.3", advertise_port=7001, advertise_kv_port=7002)
    await host.start()
    status = await host.status()
    assert (status.address, status.kv_data_address) == ("10.1.2.3:7001", "10.1.2.3:7002")
    await host.stop()


@pytest.mark.parametrize("option", ["port", "kv_port"])
async def test_a_start_that_fails_ends_what_it_had_begun(loaded: LoadedModel, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        host = make_host(loaded, **{option: port})
        with pytest.raises(ConfigurationError, match=str(port)):
            await host.start()
        await host.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "step"]
    again = make_host(loaded, **{option: port})  # nothing but the other socket was in its way
    await again.start()
    await again.stop()


async def test_stopping_before_the_start_is_fine(loaded: LoadedModel) -> None:
    await make_host(loaded).stop()


async def test_a_length_that_does_not_fit_is_refused_with_both_figures(loaded: LoadedModel) -> None:
    host = make_host(loaded, kv_cache_memory=ByteSize(64 << 10), max_model_len=512)
    with pytest.raises(ConfigurationError, match="512"):
        await host.start()
    await host.stop()


@pytest.mark.parametrize("point", ["engine.step_hang", "prefill.mid_layer"])
async def test_a_hang_in_the_very_first_step_is_noticed_like_any_other(loaded: LoadedModel, point: str) -> None:
    """The longest step there is, of a worker that has not computed anything: known from the warm-up."""
    statuses: list[int] = []
    environment = Environment(end_process=statuses.append)
    host = make_host(
        loaded,
        environment=environment,
        kv_cache_memory=ByteSize(64 << 20),
        failpoints=f"{point}=hang",
        stuck_after_s=1.0,
    )
    await host.start()
    try:
        assert host.worker.speed.prompt_tokens_total == 0
        run_one(host, "first", max_tokens=4)
        await eventually(lambda: bool(statuses), timeout_s=50.0, what="the end of the process")
        assert statuses == [STUCK_STATUS]
        assert not host._health.is_alive
    finally:
        clear_failpoints()  # the thread goes on
        await host.stop()


async def test_a_part_that_is_stuck_does_not_hold_up_a_drain_for_ever(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_SETTLE_S", 0.1)
    monkeypatch.setattr(worker_module, "_GIVE_S", 0.1)
    host = make_host(loaded)
    await host.start()
    worker = host.worker
    stuck = worker.spawn(asyncio.Event().wait(), name="a peer that does not answer")
    worker.fetcher._gave_all.clear()  # as if a peer never said that it has what it fetched
    try:
        await asyncio.wait_for(host.drain(), 60)
        assert await asyncio.wait_for(host.drain_within(30.0), 60) == 0
        assert not stuck.done()  # what else it does is its own business
    finally:
        stuck.cancel()
        await asyncio.wait_for(host.stop(), 60)
