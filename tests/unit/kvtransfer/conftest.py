"""What several of the transfer tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["event loop", "threads"])
def where_bytes_are_moved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small handoffs never leave the event loop; each test also runs as if its blocks were large."""
    if request.param == "threads":
        monkeypatch.setattr("baton.kvtransfer.transport.outlet._INLINE_BYTES", 0)
        monkeypatch.setattr("baton.kvtransfer.transport.shm._INLINE_BYTES", -1)
