"""``baton demo``: one question to the bundled model through both pools, and what became of it."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.services.local.bundled import with_model
from baton.services.local.cluster import LocalCluster
from baton.services.local.demo_model.words import ADJECTIVES, NOUNS
from baton.services.local.gateway_client import GatewayClient, GatewayUnreachable
from baton.services.local.supervisor import ClusterFailed, Supervisor
from baton.services.runtime.process import StopSignals
from baton.services.runtime.settings import ServeSettings
from baton.services.runtime.settings_loader import load_settings

_NUM_FACTS = 24
_REQUEST_TIMEOUT_S = 120.0


class DemoFailed(Exception):
    """It ran, and the result is not what it should be."""


def run_demo() -> int:
    """Returns 0 when the answer is right and came through both pools, else 1 with words."""
    # Any free ports, so that it works beside a running installation; always through both pools, since that is the point.
    flags = {"port": 0, "grpc_port": 0, "placement": "remote", "kv_cache_memory": "256MiB"}
    settings = load_settings(ServeSettings, {"log_level": "warning", **flags})
    try:
        return asyncio.run(_demo(with_model(settings)))
    except (DemoFailed, ClusterFailed, GatewayUnreachable) as error:
        sys.stderr.write(f"baton demo: {error}\n")
        return 1


async def _demo(settings: ServeSettings) -> int:
    with StopSignals() as signals:
        cluster = LocalCluster(settings)
        supervisor = Supervisor(cluster)
        work = asyncio.create_task(_ask_one(supervisor, cluster))
        stopping = asyncio.create_task(signals.drain.wait())
        try:
            await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            return 0
        finally:
            for task in (work, stopping):
                task.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)
            await supervisor.end(settings.drain_timeout_s)
            cluster.remove_files()


async def _ask_one(supervisor: Supervisor, cluster: LocalCluster) -> None:
    await supervisor.start()
    settings = cluster.settings
    client = GatewayClient(settings.host, settings.port, timeout_s=_REQUEST_TIMEOUT_S)
    question, value = make_question(random.Random())  # noqa: S311  another question each time, no secret
    body = {
        "model": settings.served_model_name,
        "max_tokens": 24,
        "temperature": 0,
        "messages": [{"role": "user", "content": question}],
    }
    answer = await asyncio.to_thread(client.post, "/v1/chat/completions", body)
    if answer.status != 200:
        raise DemoFailed(f"the request failed with {answer.status}: {answer.body}")
    text = answer.body["choices"][0]["message"]["content"]
    receipt = await asyncio.to_thread(client.get, f"/v1/requests/{answer.body['id']}")
    if receipt.status != 200:
        raise DemoFailed(f"there is no receipt: {receipt.status} {receipt.body}")
    console = Console()
    console.print(f"\n[bold]Question[/bold]  {question}\n[bold]Answer[/bold]    {text}\n")
    console.print(receipt_table(receipt.body))
    check(text, value, receipt.body)
    console.print("\nRight, and through both pools.")


def make_question(rng: random.Random) -> tuple[str, str]:
    """A text of facts and a question about one of them; and the value that a right answer contains."""
    pairs = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    facts = {key: f"{rng.randrange(10_000):04}" for key in rng.sample(pairs, _NUM_FACTS)}
    asked = rng.choice(list(facts))
    stated = " ".join(f"The code for {key} is {value}." for key, value in facts.items())
    return f"{stated} What is the code for {asked}?", facts[asked]


def check(text: str, value: str, receipt: dict[str, Any]) -> None:
    """Raises DemoFailed where answer or receipt are not what they should be."""
    if value not in text:
        raise DemoFailed(
            f"the answer should contain {value}, it is {text!r}. The bundled model is small, and wrong about once in a "
            "thousand questions: run it again. Twice in a row is a fault of the installation."
        )
    decision = receipt["decision"] or {}
    workers = {decision.get("prefill"), decision.get("decode")} - {None}
    if decision.get("mode") != "remote" or len(workers) != 2:
        raise DemoFailed(f"the request did not pass through both pools: {decision}")
    if not receipt["transfer"] or not receipt["transfer"]["blocks"]:
        raise DemoFailed(f"no KV blocks were handed over: {receipt['transfer']}")


def receipt_table(receipt: dict[str, Any]) -> Table:
    """A receipt for people."""
    decision, transfer = receipt["decision"], receipt["transfer"] or {}
    table = Table(title=f"Receipt {receipt['id']}", show_header=False)
    table.add_row("outcome", str(receipt["outcome"]))
    table.add_row("path", f"{decision['prefill']} -> {decision['decode']} ({decision['mode']}: {decision['reason']})")
    tokens = f"{receipt['prompt_tokens']} prompt ({receipt['cached_tokens']} cached), {receipt['completion_tokens']} completion"
    table.add_row("tokens", tokens)
    for phase, duration_ms in receipt["phases_ms"].items():
        table.add_row(f"  {phase}", f"{duration_ms:8.2f} ms")
    for total in ("ttft_ms", "tpot_ms", "e2e_ms"):
        value = receipt[total]
        table.add_row(total.removesuffix("_ms").upper(), "-" if value is None else f"{value:8.2f} ms")
    if transfer:
        blocks = (
            f"{transfer['blocks']} blocks, {transfer['bytes']:,} bytes over {transfer['path']}, {transfer['checksum']}"
        )
        table.add_row("transfer", blocks)
    table.add_row("retries", str(receipt["retries"]))
    return table
