"""The gateway process: what it takes before it loads, what it counts, and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import tiny_tokenizers
from helpers.scripted_worker import ScriptedWorker, run_worker
from helpers.waiting import eventually
from prometheus_client.parser import text_string_to_metric_families

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.errors import ConfigurationError, ErrorCode
from baton.services.core.router import Role
from baton.services.gateway.service import GatewayService
from baton.services.runtime.net import free_port
from baton.services.runtime.settings import GatewaySettings

HOST = "127.0.0.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizers.write_folder(tmp_path)
    config = {"model_type": "qwen3", "vocab_size": 1000, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def answer(worker: ScriptedWorker, spec: pb.GenerationSpec) -> None:
    worker.say(spec, 0, *[5] * spec.sampling.max_tokens, finish_reason=pb.FINISH_REASON_LENGTH)


class Running:
    def __init__(self, service: GatewayService, client: httpx.AsyncClient) -> None:
        self.service = service
        self.client = client

    async def ready(self, status: int) -> dict[str, Any]:
        """What /ready says once it answers with this status."""
        async with asyncio.timeout(10.0):
            while (response := await self.client.get("/ready")).status_code != status:
                await asyncio.sleep(0.01)
        return dict(response.json())

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2} | fields
        return await self.client.post("/v1/completions", json=body)

    async def counters(self, name: str) -> dict[tuple[str, ...], float]:
        """Label values to count, without zeros."""
        page = (await self.client.get("/metrics")).text
        return {
            tuple(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and sample.value
        }


def make_settings(folder: Path, **settings: Any) -> GatewaySettings:
    values = {"port": free_port(HOST), "grpc_port": 0, "model": str(folder), "served_model_name": "tiny"}
    return GatewaySettings(**(values | {"nats_url": "none"} | settings))


@asynccontextmanager
async def serving(folder: Path, *workers: ScriptedWorker, **settings: Any) -> AsyncIterator[Running]:
    made = make_settings(folder, worker=[worker.address for worker in workers], **settings)
    service = GatewayService(made)
    await service.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{made.port}", timeout=10.0) as client:
            yield Running(service, client)
    finally:
        await service.stop()


@pytest.mark.parametrize("option", ["port", "grpc_port"])
async def test_a_port_in_use_is_told_before_anything_is_loaded(tmp_path: Path, option: str) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        service = GatewayService(make_settings(tmp_path / "no such model", **{option: taken.getsockname()[1]}))
        with pytest.raises(ConfigurationError, match=str(taken.getsockname()[1])):
            await service.start()
        await service.stop()


@pytest.mark.parametrize("host", [HOST, "0.0.0.0"])
async def test_operators_have_a_listener_and_the_public_one_is_theirs_too_on_loopback_alone(
    folder: Path, tmp_path: Path, host: str
) -> None:
    keys = tmp_path / "admin-keys"
    keys.write_text("operator\n")
    admin_url = f"http://{HOST}:{(admin_port := free_port(HOST))}"
    options = {"host": host, "allow_insecure_bind": True, "admin_port": admin_port, "admin_key_file": keys}
    async with serving(folder, **options) as running, httpx.AsyncClient() as client:
        assert (await running.client.get("/v1/decisions")).status_code == (200 if host == HOST else 404)
        assert (await client.get(f"{admin_url}/v1/decisions")).status_code == 401
        key = {"authorization": "Bearer operator"}
        assert (await client.get(f"{admin_url}/v1/decisions", headers=key)).status_code == 200
        assert (await client.post(f"{admin_url}/v1/completions", json={}, headers=key)).status_code == 404
        keys.write_text("another\n")
        async with asyncio.timeout(30.0):
            while (await client.get(f"{admin_url}/", headers={"x-api-key": "another"})).status_code != 200:
                await asyncio.sleep(0.05)
        assert (await client.get(f"{admin_url}/v1/decisions", headers=key)).status_code == 401
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((HOST, admin_port))
        again.listen()


async def test_a_failed_start_leaves_the_port_free(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "no such model")
    service = GatewayService(settings)
    with pytest.raises(ConfigurationError):
        await service.start()
    await service.stop()
    with socket.socket() as again:
        again.bind((HOST, settings.port))


async def test_stopping_before_the_start_is_fine(folder: Path) -> None:
    await GatewayService(make_settings(folder)).stop()


async def test_each_request_counts_once_towards_its_service_level(folder: Path) -> None:
    async with run_worker("c", Role.COLOCATED, answer) as worker, serving(folder, worker) as running:
        await running.ready(200)
        assert (await running.complete()).status_code == 200
        assert (await running.complete(n=3)).status_code == 200  # one request, whatever it asks for
        assert (await running.complete(slo={"class": "batch"})).status_code == 200
        assert (await running.complete(slo={"ttft_ms": 0.001})).status_code == 200
        assert (await running.complete(temperature=-1)).status_code == 400  # never admitted
        worker.on_start = lambda worker, spec: worker.fail(spec, ErrorCode.INTERNAL, retryable=False)
        assert (await running.complete()).status_code == 500
        assert await running.counters("baton_slo_met_total") == {("standard",): 2.0, ("batch",): 1.0}
        missed = {("standard", "ttft"): 1.0, ("standard", "error"): 1.0}
        assert await running.counters("baton_slo_missed_total") == missed
        assert await running.counters("baton_gateway_requests_in_flight") == {}


async def test_refused_requests_count_as_missed(folder: Path) -> None:
    async with serving(folder, worker_wait_s=0.0) as running:
        response = await running.complete()
        assert response.status_code == 503
        assert await running.counters("baton_slo_missed_total") == {("standard", "refused"): 1.0}
        await running.service.drain()
        assert (await running.complete()).status_code == 503
        assert await running.counters("baton_slo_missed_total") == {("standard", "refused"): 2.0}
        assert await running.counters("baton_slo_met_total") == {}


async def test_ready_outlives_the_prefill_pool_and_says_so(folder: Path) -> None:
    async with (
        run_worker("d", Role.DECODE, answer) as decode,
        run_worker("p", Role.PREFILL) as prefill,
        serving(folder, decode, prefill) as running,
    ):
        assert await running.ready(200) == {"status": "ready"}
        await prefill.stop()
        async with asyncio.timeout(10.0):
            while "reason" not in (said := await running.ready(200)):
                await asyncio.sleep(0.01)
        assert "no prefill worker" in said["reason"]
        assert (await running.complete()).status_code == 200
        await running.service.drain()
        assert "draining" in (await running.ready(503))["error"]["message"]


@pytest.mark.parametrize(("placement", "prompt_share"), [("auto", 0.4), ("remote", 0.0), ("local", 0.0)])
async def test_prompts_beside_streams_take_no_seat_where_they_can_go_elsewhere(
    folder: Path, placement: str, prompt_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = ScriptedWorker.status

    def status(worker: ScriptedWorker, **fields: Any) -> pb.WorkerStatus:
        return scripted(worker, running=2, prompt_share=0.4, queued_tokens=50, **fields)

    monkeypatch.setattr(ScriptedWorker, "status", status)
    async with (
        run_worker("d", Role.DECODE, answer) as decode,
        run_worker("p", Role.PREFILL) as prefill,
        serving(folder, decode, prefill, placement=placement) as running,
    ):
        await eventually(lambda: running.service._others_tokens == 100, what="reports of both workers")
        assert running.service._deps.admission.control.prompt_share == pytest.approx(prompt_share)


async def test_a_decode_worker_alone_is_enough_where_nobody_else_is_named(folder: Path) -> None:
    async with run_worker("d", Role.DECODE, answer) as decode, serving(folder, decode) as running:
        assert await running.ready(200) == {"status": "ready"}


async def test_a_decode_worker_waits_for_the_prefill_worker_that_is_named(folder: Path) -> None:
    async with run_worker("d", Role.DECODE, answer) as decode:
        late = ScriptedWorker("p", Role.PREFILL, lambda worker, spec: None)
        late.address = f"{HOST}:{free_port(HOST)}"
        async with serving(folder, decode, late) as running:
            async with asyncio.timeout(10.0):
                while not [
                    w for w in (await running.client.get("/v1/workers")).json()["data"] if w["state"] == "ready"
                ]:
                    await asyncio.sleep(0.01)
            assert "no prefill worker" in (await running.ready(503))["error"]["message"]
            await late.listen(int(late.address.rpartition(":")[2]))
            assert await running.ready(200) == {"status": "ready"}
            await late.stop()
