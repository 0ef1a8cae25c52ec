"""What scenarios ask of an installation beyond their load. A probe returns what is wrong, or nothing."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
from chaos.client import Answer, Behaviour, get, get_json, stream
from chaos.failpoints import set_failpoints
from helpers.tiny_models import VOCAB_SIZE

from baton.api.common.v1 import common_pb2 as pb
from baton.api.kvtransfer.v1 import kvtransfer_pb2, kvtransfer_pb2_grpc
from baton.services.runtime.grpc import create_channel

if TYPE_CHECKING:
    from chaos.cluster import ChaosCluster
    from chaos.run import Run

_READY_S = 10.0
Probe = Callable[["ChaosCluster", "Run"], Awaitable[str]]


async def handoffs_that_nobody_opened(cluster: ChaosCluster, run: Run) -> str:
    """Reservations and aborts with made-up and with stolen ids are refused, one by one, and the worker lives on."""
    worker = next(worker for worker in await cluster.workers() if worker["id"] == "decode-0")
    request_ids = [secrets.token_hex(16)] * 2 + [exchange.request_id for exchange in run.exchanges[:4]]
    async with create_channel(cluster.direct_address("decode-0")) as channel:
        stub = kvtransfer_pb2_grpc.KVTransferServiceStub(channel)
        for request_id in request_ids:
            message = kvtransfer_pb2.ReserveRequest(
                handoff=kvtransfer_pb2.HandoffKey(request_id=request_id, attempt=1),
                endpoints=kvtransfer_pb2.Endpoints(
                    sender=pb.WorkerIdentity(worker_id="prefill-9", incarnation=secrets.token_hex(16)),
                    receiver=pb.WorkerIdentity(worker_id="decode-0", incarnation=str(worker["incarnation"])),
                ),
                block_names=[secrets.token_bytes(16)],
                num_tokens=16,
                transport="tcp",
            )
            try:
                answer = await stub.Reserve(message, timeout=30.0)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return f"the worker did not answer: {error.details()}"
                continue  # refused as a message
            if answer.HasField("grant"):
                return f"a reservation for {request_id} by nobody was granted"
    return "" if cluster.processes["decode-0"].is_running else "decode-0 has died"


async def cached_again(cluster: ChaosCluster, run: Run) -> str:
    """Every worker's blocks are known to the gateway: a prompt that was answered finds its blocks."""
    deadline = time.monotonic() + 15.0
    ask = max((exchange.ask for exchange in run.exchanges), key=lambda ask: len(ask.prompt))
    while True:
        name = f"{run.name}-again-{secrets.token_hex(4)}"
        answer = Answer()
        await stream(cluster.url, name, ask.body(f"{run.name}-0"), Behaviour(), answer)
        receipt = await get_json(cluster.url, f"/v1/requests/{name}")
        if receipt["cached_tokens"] >= len(ask.prompt) // 16 * 16 - 16:
            return ""
        if time.monotonic() > deadline:
            return f"{receipt['cached_tokens']} of {len(ask.prompt)} tokens were found again"


async def ready(cluster: ChaosCluster, run: Run) -> str:
    """GET /ready says 200, ten seconds after the workers are known at the latest: the first pair has to be probed."""
    started_s = time.monotonic()
    while (answer := await get(cluster.url, "/ready"))[0] != 200 and time.monotonic() - started_s < _READY_S:
        await asyncio.sleep(0.05)
    return "" if answer[0] == 200 else f"/ready says {answer[0]}: {answer[1].decode()}"


async def degraded(cluster: ChaosCluster, run: Run) -> str:
    """GET /ready says 200 and that something is lost."""
    status, body = await get(cluster.url, "/ready")
    return "" if status == 200 and b"degraded" in body else f"/ready says {status}: {body.decode()}"


async def all_run(cluster: ChaosCluster, run: Run) -> str:
    """No process has ended."""
    ended = [f"{p.name} ({p.exit_status})" for p in cluster.processes.values() if p.num_starts and not p.is_running]
    return f"{', '.join(ended)} ended" if ended else ""


async def one_of_each_id(cluster: ChaosCluster, run: Run) -> str:
    """No id is served by two processes, and each worker is reachable."""
    workers = await cluster.workers()
    ids = [worker["id"] for worker in workers]
    if len(ids) != len(set(ids)):
        return f"ids {ids}"
    return "" if all(worker["state"] == "ready" for worker in workers) else f"states {await cluster.states()}"


async def no_pair_with_decode_9(cluster: ChaosCluster, run: Run) -> str:
    """The worker of another layout is listed and decodes nothing that was prefilled elsewhere."""
    if "decode-9" not in await cluster.states():
        return "decode-9 is not listed"
    for exchange in run.exchanges:
        receipt = await get_json(cluster.url, f"/v1/requests/{exchange.request_id}")
        for attempt in receipt["attempts"]:
            if attempt["decode"] == "decode-9" and attempt["prefill"] is not None:
                return f"{exchange.request_id} was prefilled by {attempt['prefill']} for decode-9"
    return ""


async def poison(cluster: ChaosCluster, run: Run) -> str:
    """A request at which every worker crashes gets an error after two of them; then all others are served as before."""
    token = VOCAB_SIZE - 1  # nothing else runs meanwhile
    for name in cluster.worker_names:
        await set_failpoints(cluster, name, f"engine.step_crash=crash:token({token})")
    answer = Answer()
    ask = replace(run.exchanges[0].ask, prompt=(*run.exchanges[0].ask.prompt, token), seed=None)
    try:
        async with asyncio.timeout(60.0):
            await stream(cluster.url, f"{run.name}-poison", ask.body("poison"), Behaviour(), answer)
    except TimeoutError:
        return f"no end; {run.result.crashes} crashes so far"
    if not answer.error or answer.finish_reasons:
        return f"it was answered with {answer.token_ids}"
    async with asyncio.timeout(60.0):
        while not all(process.is_running for process in cluster.processes.values()):
            await asyncio.sleep(0.1)  # the supervisor has not started the last one again yet
    await cluster.wait_ready()
    for name in cluster.worker_names:
        await set_failpoints(cluster, name, "on")
    return "" if run.result.crashes else "no worker crashed: the failpoint was not reached"


PROBES: dict[str, Probe] = {
    probe.__name__: probe
    for probe in (
        handoffs_that_nobody_opened,
        cached_again,
        ready,
        degraded,
        all_run,
        one_of_each_id,
        no_pair_with_decode_9,
        poison,
    )
}
