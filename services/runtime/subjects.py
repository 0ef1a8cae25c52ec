"""The NATS subjects, in one place. proto/baton/api/events says what is published on each."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"[a-z0-9-]{1,64}")


@dataclass(frozen=True, slots=True)
class Subjects:
    """Subjects of one cluster.

    Names are checked before they become part of a subject: a dot or wildcard in one would address somebody else.
    """

    cluster: str

    def __post_init__(self) -> None:
        _check(self.cluster)

    @property
    def discover(self) -> str:
        return f"baton.{self.cluster}.discover"

    @property
    def all_workers(self) -> str:
        return f"baton.{self.cluster}.worker.*"

    @property
    def all_kv(self) -> str:
        return f"baton.{self.cluster}.kv.*"

    def worker(self, worker_id: str) -> str:
        return f"baton.{self.cluster}.worker.{_check(worker_id)}"

    def kv(self, worker_id: str) -> str:
        return f"baton.{self.cluster}.kv.{_check(worker_id)}"

    def kv_snapshot(self, worker_id: str) -> str:
        return f"baton.{self.cluster}.kvsnapshot.{_check(worker_id)}"


def _check(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ValueError(f"a name in a subject must be 1 to 64 characters of [a-z0-9-], got {token!r}")
    return token
