"""Writes that do not end: the worker says so, takes nothing new, and is well again when they do, or else is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.cluster import Cluster, run_cluster
from helpers.oracle import Subject, expected_tokens, make_prompt
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.kvtransfer.errors import TransferCode
from baton.kvtransfer.identity import WorkerIdentity
from baton.kvtransfer.sending import HandoffSpec
from baton.kvtransfer.transport.base import Landed
from baton.services.runtime.health import READY_SERVICE
from baton.services.runtime.metrics import Metrics
from baton.services.worker.host import WorkerHost
from baton.services.worker.quarantine import QUARANTINE_STATUS

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PROMPT_TOKENS = 100  # six full blocks and a part of one: more than a share of 0.05 of 100 blocks


@pytest.fixture
def subject(get_subject: Callable[[str], Subject]) -> Subject:
    return get_subject("qwen3")


class EndlessWrites:
    """What lands on a worker does not end, also when it is told to stop, until ``end``."""

    def __init__(self, host: WorkerHost[Any]) -> None:
        self.held: list[Any] = []
        self.are_endless = True
        landing = host._agent._context.transports["inproc"]
        original = landing.land

        def land(arrival: Any) -> Any:
            canaries = {pair.fence for pair in host._agent._receiving._pairs.values()}
            if self.are_endless and arrival.fence not in canaries:
                self.held.append(arrival)
                return None
            return original(arrival)

        landing.land = land  # type: ignore[method-assign]

    def end(self) -> None:
        self.are_endless = False
        for arrival in self.held:
            arrival.ended(Landed(broken=sorted(arrival.allowed)))


async def health_of(host: WorkerHost[Any], service: str) -> int:
    async with grpc.aio.insecure_channel(host.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        status: int = answer.status
        return status


async def fill_quarantine(cluster: Cluster, writes: list[EndlessWrites]) -> WorkerHost[Any]:
    """A request whose client leaves while its blocks land. Returns the worker where they do."""
    request = asyncio.create_task(cluster.generate(make_prompt(PROMPT_TOKENS, seed=1)))
    await eventually(lambda: any(write.held for write in writes), timeout_s=60)
    request.cancel()
    with suppress(asyncio.CancelledError):
        await request

    def filled() -> list[WorkerHost[Any]]:
        return [host for host in cluster.hosts if host._agent.stats().num_quarantined > 5]

    await eventually(filled, timeout_s=60)
    return filled()[0]


async def test_a_worker_over_its_budget_takes_nothing_new_and_is_well_again_when_the_writes_end(
    subject: Subject, key_file: Path
) -> None:
    async with run_cluster(
        subject.loaded, key_file, transport="auto", num_decode=2, num_blocks=100, max_quarantine_share=0.05
    ) as cluster:
        prefill = cluster.host("prefill")
        writes = [EndlessWrites(host) for host in cluster.hosts if host.settings.role == "decode"]
        decode = await fill_quarantine(cluster, writes)
        other = next(host for host in cluster.hosts if host.settings.role == "decode" and host is not decode)
        for write in writes:
            write.are_endless = False

        # It says so, everywhere.
        await eventually(lambda: decode._quarantine.problem, timeout_s=60)
        status = await decode.status()
        assert status.state == pb.WORKER_STATE_UNHEALTHY
        assert status.problem == (
            f"{decode._agent.stats().num_quarantined} of 100 KV blocks are in quarantine, at most 5 may be: "
            "transfers that were given up have not ended"
        )
        assert await health_of(decode, READY_SERVICE) == NOT_SERVING
        assert await health_of(decode, "") == SERVING
        metrics = Metrics(lambda: [status]).render().decode()
        assert f'baton_worker_unhealthy{{worker="{decode.identity.worker_id}"}} 1.0' in metrics
        await eventually(lambda: described(cluster, decode)["state"] == "unhealthy", timeout_s=60)
        assert described(cluster, decode)["problem"] == status.problem

        # It takes nothing new: whoever asks all the same hears why. What is asked of the pool goes to the other one.
        key = HandoffSpec(
            "direct",
            1,
            WorkerIdentity(decode.identity.worker_id, decode.identity.incarnation),
            decode.address,
            [b"n" * 16],
            16,
        )
        refusal = await prefill._agent.open(key).wait()
        assert refusal is not None
        assert (refusal.code, refusal.retryable) == (TransferCode.NO_CAPACITY, True)
        assert "slots are in quarantine, at most 5 may be" in refusal.message
        prompt = make_prompt(PROMPT_TOKENS, seed=2)
        answer = await cluster.generate(prompt, ignore_eos=True)
        assert answer.token_ids == expected_tokens(subject, prompt)
        assert decided(cluster, answer.receipt_id) == other.identity.worker_id

        # The writes end.
        for write in writes:
            write.end()
        await eventually(lambda: not decode._quarantine.problem, timeout_s=60)
        status = await decode.status()
        assert (status.state, status.problem, status.kv_blocks.quarantine) == (pb.WORKER_STATE_READY, "", 0)
        assert await health_of(decode, READY_SERVICE) == SERVING
        await eventually(lambda: described(cluster, decode)["state"] == "ready", timeout_s=60)
        answers = await cluster.generate_all([make_prompt(60, seed=seed) for seed in range(4)], ignore_eos=True)
        assert decode.identity.worker_id in {decided(cluster, answer.receipt_id) for answer in answers}
        await cluster.assert_clean()


async def test_a_worker_whose_writes_do_not_end_is_drained_and_ends_itself(
    subject: Subject, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_cluster(
        subject.loaded, key_file, num_blocks=100, max_quarantine_share=0.05, replace_unhealthy_after_s=0.5
    ) as cluster:
        decode, statuses = cluster.host("decode"), []
        monkeypatch.setattr(decode._quarantine, "_end", statuses.append)
        writes = EndlessWrites(decode)
        await fill_quarantine(cluster, [writes])
        await eventually(lambda: statuses == [QUARANTINE_STATUS], timeout_s=60)
        assert await health_of(decode, "") == NOT_SERVING
        assert (await decode.status()).state == pb.WORKER_STATE_DRAINING
        await eventually(lambda: described(cluster, decode)["state"] == "draining", timeout_s=60)
        writes.end()  # so that the test ends: too late for the worker
        await eventually(lambda: decode._agent.stats().num_quarantined == 0, timeout_s=60)
        assert await health_of(decode, "") == NOT_SERVING


def described(cluster: Cluster, host: WorkerHost[Any]) -> Any:
    return next(row for row in cluster.registry.describe() if row["id"] == host.identity.worker_id)


def decided(cluster: Cluster, receipt_id: str) -> str:
    receipt: Any = cluster.receipts.get(receipt_id)
    decode: str = receipt["decision"]["decode"]
    return decode
