"""Every planned pair is probed, a few at a time, whether or not workers say anything meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from helpers.waiting import eventually

from baton.services.core.fleet import Fleet
from baton.services.core.links import LinkMatrix, LinkState, PairKey, ProbeResult
from baton.services.core.router import Role, WorkerView
from baton.services.gateway.link_prober import MAX_PROBES_AT_ONCE, LinkProber
from baton.services.gateway.registry import Registry


class SilentRegistry:
    """Workers that are there and never report."""

    def __init__(self, views: list[WorkerView]) -> None:
        self.fleet = Fleet()
        self.num_forgotten = 0
        self.known = {}
        for view in views:
            self.fleet.put(view)
            link = SimpleNamespace(worker_id=view.worker_id, incarnation=view.incarnation)
            self.known[view.worker_id] = SimpleNamespace(link=link)

    def __iter__(self) -> Any:
        return iter(self.known.values())

    def get(self, worker_id: str) -> Any:
        return self.known.get(worker_id)

    async def wait_changed(self) -> bool:
        return await asyncio.Event().wait()


class CountingProber(LinkProber):
    """Asks nobody: every pair works."""

    most_at_once = 0

    async def _ask(self, prefill: Any, decode: Any) -> ProbeResult | None:
        self.most_at_once = max(self.most_at_once, len(self._probes))
        await asyncio.sleep(0)
        return ProbeResult("tcp", is_verified=True)


async def test_each_probe_that_ends_makes_room_for_the_next() -> None:
    roles = [Role.PREFILL] * 5 + [Role.DECODE] * 6 + [Role.COLOCATED]
    views = [WorkerView(f"w{n}", f"i{n}", role, "h:1", "x") for n, role in enumerate(roles)]
    registry, links = SilentRegistry(views), LinkMatrix()
    # A clock that stands still: nothing is due a second time, and no later look helps.
    prober = CountingProber(cast(Registry, registry), links, clock=lambda: 0.0)
    run = asyncio.create_task(prober.run())
    pairs = [PairKey(f"i{one}", f"i{other}") for one in range(5) for other in range(5, 11)]
    await eventually(lambda: all(links.get(pair).state is LinkState.VERIFIED for pair in pairs), timeout_s=30)
    assert sorted(links.pairs()) == sorted(pairs)
    assert prober.most_at_once == MAX_PROBES_AT_ONCE
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert not prober._probes
