"""The simulation finds mistakes: each of these is made on purpose, and seen within a few seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.simulation.scenario import Scenario, draw_scenario
from helpers.simulation.world import run_seed

from baton.kvtransfer.receiver import Receiver
from baton.kvtransfer.rows import Rows
from baton.services.core.block_hash import BlockNamer
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
    patch.setattr(Rows, "checksums", lambda self, indices: [0 for _ in indices])


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


def keeps_what_was_sent(patch: Patch) -> None:
    """A prefill worker does not let go of blocks that were handed over."""
    patch.setattr(PrefillScheduler, "release", lambda self, request_id, attempt=None: False)


def says_nothing_of_a_lost_link(patch: Patch) -> None:
    """The gateway waits for a worker that is gone."""
    patch.setattr(WorkerLink, "_fail_all", lambda self, reason: None)


# What the mistake needs to matter: how many faults, and of which kinds. With one there is a spare, so that nobody may fail.
ALL: dict[Callable[[Patch], None], tuple[int, tuple[str, ...]]] = {
    commits_without_looking: (2, ("cut", "flip", "reset")),
    trusts_bytes: (6, ("flip",)),
    frees_what_is_being_sent: (2, ("slow_link",)),
    forgets_to_cancel: (0, ()),
    keeps_aborted_slots: (2, ("crash", "reset")),
    ignores_the_salt: (0, ()),
    resumes_from_the_prompt: (2, ("crash",)),
    forgets_who_left: (2, ("reset", "gateway")),
    keeps_what_was_sent: (0, ()),
    says_nothing_of_a_lost_link: (1, ("crash",)),
}


@pytest.mark.parametrize("mistake", ALL, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(mistake: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    num_faults, kinds = ALL[mistake]

    def make(seed: int) -> Scenario:
        scenario = draw_scenario(seed, num_faults=num_faults, kinds=kinds or None)
        if "flip" in kinds:
            for worker in scenario.workers:
                worker.settings["transport"] = "tcp"  # where bytes travel, and can be damaged
        return scenario

    found = next((seed for seed in range(MAX_SEEDS) if run_seed(seed, make=make).problems), None)
    print(f"{mistake.__name__}: seed {found}")
    assert found is not None, f"{MAX_SEEDS} seeds saw nothing of it: {mistake.__doc__}"
