"""The bus drops rather than waits, comes back by itself, and no message can end a subscription."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import nats.aio.client as nats_client
import pytest
from helpers.waiting import eventually

from baton.services.local.nats_server import NatsServer
from baton.services.runtime import bus as bus_module
from baton.services.runtime.bus import Bus, InProcessBus, NatsBus, NoBus
from baton.services.runtime.subjects import Subjects

TOKEN = "a-token"


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    server = NatsServer(tmp_path, token_file)
    await server.start()
    yield server
    await server.child.end(5)


@asynccontextmanager
async def connected(url: str, *subscriptions: tuple[str, Callable[[str, bytes], None]]) -> AsyncIterator[NatsBus]:
    bus = NatsBus(url, name="test", token=TOKEN)
    for subject, handler in subscriptions:
        bus.subscribe(subject, handler)
    await bus.start()
    try:
        await eventually(lambda: bus.is_connected, what="the connection")
        yield bus
    finally:
        await bus.close()


async def test_messages_reach_all_subscribers_whose_pattern_matches(nats: NatsServer) -> None:
    got: list[tuple[str, bytes]] = []
    others: list[tuple[str, bytes]] = []
    async with (
        connected(
            nats.url, ("a.*.c", lambda s, p: got.append((s, p))), ("a.b", lambda s, p: others.append((s, p)))
        ) as one,
        connected(nats.url) as two,
    ):
        two.publish("a.x.c", b"1")
        one.publish("a.y.c", b"2")
        await eventually(lambda: len(got) == 2)
        assert sorted(got) == [("a.x.c", b"1"), ("a.y.c", b"2")]
        assert others == []


async def test_starting_does_not_wait_for_a_server_and_connects_when_it_comes(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    server = NatsServer(tmp_path, token_file)
    await server.start()
    await server.child.end(5)
    bus = NatsBus(server.url, name="test", token=TOKEN)
    introductions: list[int] = []
    bus.on_connect(lambda: introductions.append(1))
    async with asyncio.timeout(0.5):
        await bus.start()
    bus.publish("a", b"lost")
    assert bus.num_dropped == {"disconnected": 1}
    await server.start()  # the same port
    await eventually(lambda: introductions == [1], what="the first connection")
    await bus.close()
    await server.child.end(5)


async def test_a_restarted_server_finds_subscriptions_again_and_callbacks_run_again(nats: NatsServer) -> None:
    got: list[bytes] = []
    async with connected(nats.url, ("s", lambda _, p: got.append(p))) as bus:
        introductions: list[int] = []
        bus.on_connect(lambda: introductions.append(1))
        assert introductions == [1]
        nats.child.kill()
        await nats.child.wait()
        await eventually(lambda: not bus.is_connected, what="noticing the loss")
        bus.publish("s", b"lost")
        await nats.start()
        await eventually(lambda: introductions == [1, 1], timeout_s=5, what="the second connection")
        bus.publish("s", b"found")
        await eventually(lambda: got == [b"found"])
        assert bus.num_dropped == {"disconnected": 1}


async def test_a_frozen_server_is_noticed_and_never_blocks_the_publisher(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "_PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(bus_module, "_MAX_QUEUED_MESSAGES", 10)
    async with connected(nats.url) as bus:
        pid = nats.child.pid
        assert pid is not None
        import os

        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(1000):
                bus.publish("s", b"x" * 1000)
            assert bus.num_dropped["queue_full"] >= 900
            await eventually(lambda: not bus.is_connected, what="noticing the frozen server")
        finally:
            os.kill(pid, signal.SIGCONT)
        await eventually(lambda: bus.is_connected, what="the new connection")


async def test_a_handler_that_raises_keeps_its_subscription(nats: NatsServer) -> None:
    got: list[bytes] = []

    def handler(_: str, payload: bytes) -> None:
        got.append(payload)
        if payload == b"bad":
            raise ValueError("not a message")

    async with connected(nats.url, ("s", handler)) as bus:
        bus.publish("s", b"bad")
        bus.publish("s", b"good")
        await eventually(lambda: got == [b"bad", b"good"])


async def test_a_message_over_the_servers_limit_is_dropped_and_counted(nats: NatsServer) -> None:
    got: list[bytes] = []
    async with connected(nats.url, ("s", lambda _, p: got.append(p))) as bus:
        bus.publish("s", bytes(9_000_000))
        bus.publish("s", b"small")
        await eventually(lambda: got == [b"small"])
        assert bus.num_dropped == {"too_large": 1}


async def test_closing_sends_what_was_published_before(nats: NatsServer) -> None:
    got: list[bytes] = []
    async with connected(nats.url, ("s", lambda _, p: got.append(p))):
        async with connected(nats.url) as bus:
            bus.publish("s", b"leaving")
        await eventually(lambda: got == [b"leaving"])


async def test_a_wrong_token_is_retried_quietly_for_ever(nats: NatsServer) -> None:
    bus = NatsBus(nats.url, name="test", token="wrong")
    await bus.start()
    log = nats._directory / "nats.log"
    await eventually(lambda: log.read_text().count("authentication error") >= 2, what="a second try")
    assert not bus.is_connected
    await bus.close()


async def test_closing_ends_also_where_the_client_swallows_the_cancellation(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``asyncio.wait_for`` does before Python 3.12, when both come at once."""
    is_connecting, num_connects = asyncio.Event(), 0
    connect = nats_client.Client.connect

    async def connect_uncancelled(self: nats_client.Client, **options: Any) -> None:
        nonlocal num_connects
        num_connects += 1
        is_connecting.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await connect(self, **options)

    monkeypatch.setattr(nats_client.Client, "connect", connect_uncancelled)
    for token in (TOKEN, "wrong"):
        is_connecting.clear()
        bus = NatsBus(nats.url, name="test", token=token)
        await bus.start()
        await is_connecting.wait()
        await bus.close()
    assert num_connects == 2


async def test_in_process_bus_has_the_same_patterns_and_delivers_later() -> None:
    bus: Bus = InProcessBus()
    got: list[str] = []
    bus.subscribe("a.*.c", lambda s, _: got.append(s))
    bus.subscribe("a.b.c", lambda s, _: bus.publish("a.done.c", b"") if s == "a.b.c" else None)
    await bus.start()
    bus.publish("a.b.c", b"")
    bus.publish("a.b", b"")
    bus.publish("a.b.c.d", b"")
    assert got == [], "never from inside publish"
    await eventually(lambda: len(got) == 2)
    assert got == ["a.b.c", "a.done.c"]
    await bus.close()
    bus.publish("a.b.c", b"")
    assert bus.num_dropped == {"disconnected": 1}


def test_without_a_bus_everything_is_dropped() -> None:
    bus = NoBus()
    bus.publish("a", b"")
    assert not bus.is_connected
    assert bus.num_dropped == {"no_bus": 1}


def test_subjects_are_built_from_checked_names() -> None:
    subjects = Subjects("east-1")
    assert subjects.worker("prefill-0") == "baton.east-1.worker.prefill-0"
    assert subjects.all_workers == "baton.east-1.worker.*"
    assert subjects.kv("d") == "baton.east-1.kv.d"
    assert subjects.kv_snapshot("d") == "baton.east-1.kvsnapshot.d"
    for bad in ("", "a.b", "*", ">", "A", "x" * 65, "a b"):
        with pytest.raises(ValueError):
            subjects.worker(bad)
        with pytest.raises(ValueError):
            Subjects(bad)
