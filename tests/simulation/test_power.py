"""The simulation finds mistakes: each of these is made on purpose, and seen within a few seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from helpers.simulation.scenario import draw_scenario
from helpers.simulation.world import run_seed

from baton.kvtransfer import messages as m
from baton.kvtransfer.incoming import ReceiverHandoff
from baton.kvtransfer.receiver import Receiver
from baton.kvtransfer.rows import Rows
from baton.kvtransfer.transport.outlet import Outlet
from baton.services.core.block_hash import BlockNamer
from baton.services.core.block_pool import BlockPool
from baton.services.core.ladder import Ladder
from baton.services.core.scheduler.prefill import PrefillScheduler
from baton.services.decode.intake import DecodeWorker
from baton.services.gateway.worker_link import WorkerLink
from baton.services.prefill.handover import PrefillWorker
from baton.services.worker.worker import Worker

MAX_SEEDS = 40
Patch = pytest.MonkeyPatch


def commits_without_looking(patch: Patch) -> None:
    """A commit is taken although blocks are missing and no digest agrees."""
    patch.setattr(Receiver, "_is_whole", lambda self, event: True)
    patch.setattr(Receiver, "_is_wrong_manifest", lambda self, event: False)


def trusts_bytes(patch: Patch) -> None:
    """Checksums are not compared with what arrived."""
    patch.setattr(Rows, "checksum", lambda self, index: 0)


def frees_what_is_being_sent(patch: Patch) -> None:
    """A computed prompt's blocks are let go before the receiver has them."""
    start = PrefillWorker._commit

    async def commit(self: PrefillWorker, active: Any, handoff: Any, token: Any) -> None:
        self.steps.post(lambda scheduler: scheduler.release(active.id))
        await start(self, active, handoff, token)

    patch.setattr(PrefillWorker, "_commit", commit)


def forgets_to_cancel(patch: Patch) -> None:
    """The gateway does not tell workers that a request is over."""
    release = WorkerLink.release
    patch.setattr(WorkerLink, "release", lambda self, key, *, cancel: release(self, key, cancel=False))


def keeps_aborted_slots(patch: Patch) -> None:
    """A decode worker does not give back what a failed handoff held."""
    patch.setattr(DecodeWorker, "_let_go", lambda self, request_id, *, quiet: None)


def ignores_the_salt(patch: Patch) -> None:
    """One tenant finds another's blocks."""
    root = BlockNamer.root
    patch.setattr(BlockNamer, "root", lambda self, block_size, cache_salt: root(self, block_size, ""))


def resumes_from_the_prompt(patch: Patch) -> None:
    """A second attempt begins anew but goes on counting."""
    begin = Ladder._start

    def start(self: Ladder, attempt: Any) -> Any:
        [command] = begin(self, attempt)
        return [type(command)(command.attempt, self._prompt + self.token_ids[: len(self.token_ids) // 2])]

    patch.setattr(Ladder, "_start", start)


def forgets_who_left(patch: Patch) -> None:
    """A gateway that is gone leaves its requests running."""
    patch.setattr(Worker, "close_session", lambda self, session: self._sessions.discard(session))


def never_renews(patch: Patch) -> None:
    """The receiver takes no notice of heartbeats."""
    patch.setattr(ReceiverHandoff, "renew", lambda self, sent_s: False)


def names_too_early(patch: Patch) -> None:
    """Blocks can be found by name before anything was computed into them."""
    allocate = BlockPool.allocate

    def early(self: BlockPool, num_blocks: int, hold: Any) -> list[int]:
        taken = allocate(self, num_blocks, hold)
        for block_id in taken:
            self._blocks[block_id].request_refs -= 0
        return taken

    patch.setattr(BlockPool, "allocate", early)


def loses_an_abort(patch: Patch) -> None:
    """Giving up is not told to the receiver, and the sender's own blocks stay pinned."""
    patch.setattr(PrefillScheduler, "release", lambda self, request_id, attempt=None: False)


def quiet_before_it_is(patch: Patch) -> None:
    """A sender says that it reads no more while it still does."""
    cancel = Outlet.cancel

    def at_once(self: Outlet, fence: bytes, when_quiet: Callable[[], None]) -> None:
        when_quiet()
        cancel(self, fence, lambda: None)

    patch.setattr(Outlet, "cancel", at_once)


def lets_anything_land(patch: Patch) -> None:
    """A write is allowed whatever was granted."""
    patch.setattr(Receiver, "_is_outside_grant", lambda self, event: False)
    patch.setattr(Receiver, "_check_fence", lambda self, message: None)
    patch.setattr(m, "Slot", m.Slot)


ALL = {
    commits_without_looking: ("cut", "flip", "reset"),
    trusts_bytes: ("flip",),
    frees_what_is_being_sent: ("slow_link",),
    forgets_to_cancel: (),
    keeps_aborted_slots: ("crash", "reset"),
    ignores_the_salt: (),
    resumes_from_the_prompt: ("crash", "raise"),
    forgets_who_left: ("reset", "gateway"),
    never_renews: ("slow", "slow_link"),
    loses_an_abort: (),
    quiet_before_it_is: ("reset", "cut"),
    lets_anything_land: ("flip",),
}


@pytest.mark.parametrize("mistake", ALL, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(mistake: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    kinds = ALL[mistake]
    make = functools.partial(draw_scenario, num_faults=2 if kinds else 0, kinds=kinds or None)
    seeds = (seed for seed in range(MAX_SEEDS) if run_seed(seed, make=make).problems)
    found = next(seeds, None)
    print(mistake.__name__, found)
    assert found is not None, f"{MAX_SEEDS} seeds saw nothing of it: {mistake.__doc__}"
