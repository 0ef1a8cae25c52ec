"""Checksums that wait, each on its thread, until a test lets them be taken."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from baton.kvtransfer.rows import Rows

_WAIT_S = 30


@dataclass
class HashGate:
    """Open it with ``is_open.set()``."""

    is_open: threading.Event = field(default_factory=threading.Event)
    threads: set[str] = field(default_factory=set)  # that wait, or have waited
    num_running: int = 0


def close_hash_gate(monkeypatch: pytest.MonkeyPatch) -> HashGate:
    """Until the end of the test."""
    gate, checksums, lock = HashGate(), Rows.checksums, threading.Lock()

    def later(rows: Rows, indices: Iterable[int]) -> list[int]:
        with lock:
            gate.threads.add(threading.current_thread().name)
            gate.num_running += 1
        try:
            assert gate.is_open.wait(_WAIT_S)
            return checksums(rows, indices)
        finally:
            with lock:
                gate.num_running -= 1

    monkeypatch.setattr(Rows, "checksums", later)
    return gate
