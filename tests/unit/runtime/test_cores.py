"""Cores that a process may use, and what a transfer gets of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.services.runtime import cores


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_cores_respect_a_containers_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    monkeypatch.setattr(cores, "_CGROUP_QUOTA", file)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores.num_cores() == expected


@pytest.mark.parametrize(
    ("num_cores", "expected"), [(1, (1, 2)), (2, (1, 2)), (4, (1, 2)), (8, (2, 2)), (12, (3, 3)), (128, (4, 4))]
)
def test_a_transfer_gets_a_quarter_of_the_cores_each_way(num_cores: int, expected: tuple[int, int]) -> None:
    assert cores.transfer_threads(num_cores) == expected
