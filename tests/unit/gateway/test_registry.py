"""Who is known, who is used, and who is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from helpers.scripted_worker import ScriptedWorker, run_worker
from helpers.waiting import eventually

from baton.api.common.v1 import common_pb2 as pb
from baton.services.core.router import Role
from baton.services.gateway import registry as registry_module
from baton.services.gateway.layouts import block_bytes, compatibility_key
from baton.services.gateway.registry import FORGET_AFTER_S, SILENT_AFTER_S, Registry
from baton.services.gateway.worker_link import WorkerLink
from baton.services.runtime.net import free_port

GATEWAY = pb.WorkerIdentity(worker_id="gateway", incarnation="g")


class Known:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.forgotten: list[str] = []
        self.num_heard = 0
        self.registry = Registry(
            GATEWAY, clock=lambda: self.now_s, on_heard=self._count, on_forget=self.forgotten.append
        )

    def _count(self) -> None:
        self.num_heard += 1

    @property
    def usable(self) -> list[str]:
        return sorted(view.worker_id for view in self.registry.views())

    def state(self, worker_id: str) -> Any:
        return next((w["state"] for w in self.registry.describe() if w["id"] == worker_id), None)


@pytest.fixture
async def known() -> AsyncIterator[Known]:
    made = Known()
    yield made
    await made.registry.close()


async def test_a_worker_is_usable_once_it_is_linked_and_as_long_as_it_is_ready(known: Known) -> None:
    async with run_worker("d", Role.DECODE) as worker:
        known.registry.heard(worker.status())
        assert known.usable == []
        assert known.state("d") == "unreachable"
        await eventually(lambda: known.usable == ["d"])
        known.registry.heard(worker.status(state=pb.WORKER_STATE_DRAINING))
        assert known.usable == []
        assert known.state("d") == "draining"
        known.registry.heard(worker.status(running=3))
        assert (known.registry.views()[0].running, known.num_heard) == (3, 3)


async def test_a_link_that_breaks_comes_back(known: Known) -> None:
    async with run_worker("d", Role.DECODE) as worker:
        known.registry.heard(worker.status())
        await eventually(lambda: known.usable == ["d"])
        worker.hang_up()
        await eventually(lambda: known.usable == [])
        await eventually(lambda: known.usable == ["d"])
        assert known.forgotten == []


async def test_a_worker_that_cannot_be_reached_yet_is_tried_again(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection is no reason to give up on it."""
    ends: list[bool] = []
    run = WorkerLink.run

    async def watch(link: WorkerLink) -> bool:
        ends.append(await run(link))
        return ends[-1]

    monkeypatch.setattr(WorkerLink, "run", watch)
    port = free_port("127.0.0.1")
    worker = ScriptedWorker("d", Role.DECODE, lambda worker, spec: None)
    worker.address = f"127.0.0.1:{port}"
    known.registry.heard(worker.status())
    await eventually(lambda: ends == [False])
    await worker.listen(port)
    await eventually(lambda: known.usable == ["d"])
    await worker.stop()


async def test_a_worker_nobody_hears_from_is_forgotten(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "RECONNECT_LAST_S", 0.02)
    async with run_worker("d", Role.DECODE) as worker:
        known.registry.heard(worker.status())
        await eventually(lambda: known.usable == ["d"])
    await eventually(lambda: known.usable == [])
    known.registry.heard(worker.status())  # the bus still speaks of it
    known.now_s = FORGET_AFTER_S - 1.0
    known.registry.heard(worker.status())
    known.now_s += FORGET_AFTER_S - 1.0
    assert known.registry.get("d") is not None
    known.now_s += 2.0
    await eventually(lambda: known.forgotten == ["d"])
    assert known.state("d") is None


async def test_a_worker_that_said_goodbye_is_forgotten_when_its_link_ends(known: Known) -> None:
    async with run_worker("d", Role.DECODE) as worker:
        known.registry.heard(worker.status())
        await eventually(lambda: known.usable == ["d"])
        known.registry.heard(worker.status(), leaving=True)
        assert known.state("d") == "draining"
    await eventually(lambda: known.forgotten == ["d"])


async def test_a_restart_replaces_the_worker_at_once(known: Known) -> None:
    async with run_worker("d", Role.DECODE) as old, run_worker("d", Role.DECODE) as new:
        known.registry.heard(old.status())
        await eventually(lambda: known.usable == ["d"])
        known.registry.heard(new.status())
        assert known.forgotten == ["d"]
        await eventually(lambda: known.usable == ["d"])
        assert known.registry.views()[0].incarnation == new.incarnation
        # The old one's farewell may arrive last.
        known.registry.heard(old.status(), leaving=True)
        assert known.usable == ["d"]


async def test_of_two_workers_with_one_id_the_later_one_serves_whoever_speaks_last(known: Known) -> None:
    async with run_worker("d", Role.DECODE) as older, run_worker("d", Role.DECODE) as newer:
        assert known.registry.heard(older.status(started_ms=1000))
        await eventually(lambda: known.usable == ["d"])
        assert known.registry.heard(newer.status(started_ms=2000))
        for _ in range(3):
            assert not known.registry.heard(older.status(started_ms=1000))
            assert known.registry.heard(newer.status(started_ms=2000))
        await eventually(lambda: known.usable == ["d"])
        assert known.registry.views()[0].incarnation == newer.incarnation
        assert known.forgotten == ["d"]  # once, not at every announcement
        assert len(newer.sessions) == 1
        await eventually(lambda: not older.sessions)


async def test_those_who_wait_hear_of_every_change(known: Known) -> None:
    async with run_worker("d", Role.DECODE) as worker:
        waiting = [asyncio.ensure_future(known.registry.wait_changed()) for _ in range(2)]
        await asyncio.sleep(0)
        known.registry.heard(worker.status())
        assert await asyncio.gather(*waiting) == [True, True]
        waiting = [asyncio.ensure_future(known.registry.wait_changed())]
        assert await waiting[0]  # its link works
        assert known.registry.alive() == {worker.incarnation}


@pytest.mark.parametrize(
    "broken",
    [
        {"role": 99},
        {"role": pb.WORKER_ROLE_UNSPECIFIED},
        {"identity": pb.WorkerIdentity()},
        {"identity": pb.WorkerIdentity(worker_id="d")},
        {"address": ""},
        {"compatibility": pb.Compatibility()},
    ],
)
async def test_a_report_that_lacks_what_is_needed_is_ignored(known: Known, broken: dict[str, Any]) -> None:
    worker = ScriptedWorker("d", Role.DECODE, lambda worker, spec: None)
    worker.address = "127.0.0.1:1"
    known.registry.heard(worker.status(**broken))
    assert known.registry.describe() == []
    assert known.num_heard == 0


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_static_worker_of_either_kind_is_asked_who_it_is(known: Known, role: Role) -> None:
    async with run_worker("w", role) as worker:
        watch = asyncio.create_task(known.registry.watch_static(worker.address, every_s=0.01))
        await asyncio.sleep(0)
        assert not known.registry.knows_all_static
        await eventually(lambda: known.usable == ["w"])
        assert known.registry.knows_all_static
        assert known.registry.views()[0].role is role
        watch.cancel()


async def test_a_worker_that_the_bus_is_silent_about_is_asked_itself(known: Known) -> None:
    async with run_worker("d", Role.DECODE) as worker, run_worker("gone", Role.DECODE) as gone:
        known.registry.heard(worker.status(running=3))
        known.registry.heard(gone.status(running=3))
        await eventually(lambda: known.usable == ["d", "gone"])
        await gone.stop()
        await eventually(lambda: known.usable == ["d"])
        asking = asyncio.create_task(known.registry.ask_silent(every_s=0.01))
        known.now_s = SILENT_AFTER_S + 1.0
        await eventually(lambda: known.registry.views()[0].running == 0)
        assert known.num_heard == 3
        asking.cancel()


async def test_block_names_are_those_of_workers_that_decode(known: Known) -> None:
    assert known.registry.compatibility() is None
    async with run_worker("p", Role.PREFILL) as prefill, run_worker("d", Role.DECODE) as decode:
        other = pb.Compatibility(model_fingerprint="other", layout=pb.KVLayout(block_size=32))
        known.registry.heard(prefill.status(compatibility=other))
        assert known.registry.compatibility() == other
        known.registry.heard(decode.status())
        assert known.registry.compatibility() == decode.status().compatibility
        await eventually(lambda: known.usable == ["d", "p"])
        async with run_worker("d2", Role.DECODE) as second:
            known.registry.heard(second.status(compatibility=other))
            await eventually(lambda: known.usable == ["d", "d2", "p"])
            assert known.registry.compatibility() == decode.status().compatibility
            known.registry.heard(decode.status(), leaving=True)
            assert known.registry.compatibility() == other


def test_any_difference_of_blocks_keeps_workers_apart() -> None:
    base = pb.Compatibility(
        model_fingerprint="f",
        layout=pb.KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32", order="o"),
    )
    keys = {compatibility_key(base)}
    other_model = pb.Compatibility()
    other_model.CopyFrom(base)
    other_model.model_fingerprint = "g"
    keys.add(compatibility_key(other_model))
    for field, value in (("num_layers", 3), ("num_kv_heads", 3), ("head_dim", 9), ("block_size", 32)):
        changed = pb.Compatibility()
        changed.CopyFrom(base)
        setattr(changed.layout, field, value)
        keys.add(compatibility_key(changed))
    for field, text in (("dtype", "bfloat16"), ("order", "q")):
        changed = pb.Compatibility()
        changed.CopyFrom(base)
        setattr(changed.layout, field, text)
        keys.add(compatibility_key(changed))
    assert len(keys) == 8
    assert block_bytes(base.layout) == 2 * 2 * 2 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("said", "versions"),
    [({"protocol_version": 1}, "1"), ({"protocol_version": 1, "newest_protocol_version": 2}, "1 to 2"), ({}, "1")],
)
async def test_the_versions_that_a_worker_speaks_are_known_and_shown(
    known: Known, said: dict[str, int], versions: str
) -> None:
    async with run_worker("p", Role.PREFILL) as worker:
        compatibility = pb.Compatibility(model_fingerprint="f", layout=pb.KVLayout(block_size=16), **said)
        known.registry.heard(worker.status(compatibility=compatibility))
        await eventually(lambda: known.usable == ["p"])
        assert str(known.registry.views()[0].wire_versions) == versions
        assert known.registry.describe()[0]["wire_versions"] == versions
