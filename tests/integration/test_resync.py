"""KV events over a real NATS server: one that is lost is noticed, and what the gateway knows is right again by a snapshot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster import Cluster, run_cluster
from helpers.oracle import Subject, make_prompt
from helpers.waiting import eventually

from baton.services.local.nats_server import NatsServer
from baton.services.runtime.bus import Handler, NatsBus
from baton.services.runtime.subjects import Subjects

SUBJECTS = Subjects("test")
PATIENCE_S = 60.0


class HardOfHearing(NatsBus):
    """Does not hear the next message on each subject of ``unheard``; notes what it says itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unheard: set[str] = set()
        self.said: list[str] = []

    def subscribe(self, subject: str, handler: Handler) -> None:
        def hear(subject: str, payload: bytes) -> None:
            if subject in self.unheard:
                self.unheard.remove(subject)
            else:
                handler(subject, payload)

        super().subscribe(subject, hear)

    def publish(self, subject: str, payload: bytes) -> None:
        self.said.append(subject)
        super().publish(subject, payload)


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    token = tmp_path / "token"
    token.write_text("a-token")
    server = NatsServer(tmp_path, token)
    await server.start()
    yield server
    await server.child.end(5)


def known(cluster: Cluster, prompt: tuple[int, ...]) -> dict[str, int]:
    """How many blocks of the prompt each worker holds, as the gateway knows it."""
    parts = cluster.hosts[0].worker._parts  # type: ignore[union-attr]
    names = parts.namer.names(list(prompt), parts.pool.block_size, "")[: len(prompt) // parts.pool.block_size]
    return cluster.prefix_index.matches(names)


async def held(cluster: Cluster, prompt: tuple[int, ...]) -> dict[str, int]:
    """The same, as the workers have it."""
    roles = {host.settings.worker_id: host.settings.role for host in cluster.hosts}
    return {str(name): len(await cluster.block_bytes(role, prompt)) for name, role in roles.items()}


@pytest.mark.parametrize("worker_id", ["prefill-0", "decode-1"])
async def test_a_lost_event_is_mended_by_a_snapshot(
    worker_id: str, nats: NatsServer, get_subject: Callable[[str], Subject], key_file: Path, tmp_path: Path
) -> None:
    subject = get_subject("qwen3")
    bus = HardOfHearing(nats.url, name="gateway", token="a-token")
    at = {"nats_url": nats.url, "nats_token_file": tmp_path / "token"}
    async with run_cluster(subject.loaded, key_file, bus=bus, **at) as cluster:
        first, second = make_prompt(100, seed=1), make_prompt(100, seed=2)
        await cluster.generate(first, max_tokens=2, ignore_eos=True)
        whole = {"prefill-0": 6, "decode-1": 6}
        await eventually(lambda: known(cluster, first) == whole, timeout_s=PATIENCE_S, what="what both hold")
        asked = bus.said.count(SUBJECTS.kv_snapshot(worker_id))
        bus.unheard = {SUBJECTS.kv(worker_id)}
        await cluster.generate(second, max_tokens=2, ignore_eos=True)
        await eventually(lambda: not bus.unheard, timeout_s=PATIENCE_S, what="the loss")
        await eventually(lambda: known(cluster, second) == whole, timeout_s=PATIENCE_S, what="the snapshot")
        assert bus.said.count(SUBJECTS.kv_snapshot(worker_id)) > asked
        for prompt in (first, second):
            assert known(cluster, prompt) == await held(cluster, prompt) == whole
