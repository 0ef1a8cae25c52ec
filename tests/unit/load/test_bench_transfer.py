"""The transfer benchmark on a machine where not every transport works."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.kvtransfer.transport.inproc import InprocTransport
from baton.load import bench_transfer
from baton.load.report import print_table, write_json


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_transfer, "BULK_BYTES", {"4 KiB": 64 << 10})
    monkeypatch.setattr(bench_transfer, "LATENCY_SIZES", {"1 block": 1})
    monkeypatch.setattr(bench_transfer, "OVERLAP_BLOCKS", 16)
    monkeypatch.setattr(bench_transfer, "OVERLAP_BYTES_PER_S", 1e9)


def test_a_transport_that_is_not_installed_is_skipped_with_its_reason_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    skipped, *measured = bench_transfer.bench_transfer(1, ("nixl", "inproc"))
    assert (skipped.name, skipped.value, skipped.ratio) == ("nixl", None, None)
    assert "pip install 'baton-llm[nixl]'" in skipped.skipped
    assert [row.name.partition(",")[0] for row in measured] == ["inproc"] * 3
    assert all(row.value and row.ratio and not row.skipped for row in measured)

    env = {"cpu": "a CPU", "cores": 2, "torch": "2", "date": "2026-01-01"}
    print_table([skipped, *measured], env)
    assert "skipped" in capsys.readouterr().out
    write_json([skipped, *measured], env, tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert written[0]["value"] is None
    assert written[0]["skipped"] == skipped.skipped


def test_a_transport_that_the_receiver_cannot_attach_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attach(self: InprocTransport, offer: Any) -> None:
        raise TransferError(TransferCode.INCOMPATIBLE, "inproc: not today")

    monkeypatch.setattr(InprocTransport, "attach", attach)
    (row,) = bench_transfer.bench_transfer(1, ("inproc",))
    assert row.value is None
    assert "inproc: not today" in row.skipped
